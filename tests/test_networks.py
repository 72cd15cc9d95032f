"""Features extractors: sizes, parameters and values worked out in the open, and their use in Stable-Baselines3."""

import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, FlattenExtractor, NatureCNN
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack
from torch import nn

from sb3_ppo_ewma import PPG, PPOEWMA
from sb3_ppo_ewma.networks import (
    FEATURES_EXTRACTORS,
    ImpalaCNN,
    SmallGridCNN,
    features_extractor_class,
    is_channels_last,
    normalize_fan_in,
)
from sb3_ppo_ewma.policies import ImpalaPolicy, PPGImpalaPolicy

EXTRACTORS = [ImpalaCNN, SmallGridCNN]


def image(*shape: int) -> spaces.Box:
    return spaces.Box(0, 255, shape, np.uint8)


def grid(*shape: int) -> spaces.Box:
    """The space of MinAtar."""
    return spaces.Box(0, 1, shape, bool)


def n_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def unit_norms(layer: nn.Module) -> th.Tensor:
    return layer.weight.detach().flatten(1).norm(dim=1)


def convolutions(module: nn.Module) -> list[nn.Conv2d]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]


# Initialisation


def test_fan_in_of_a_linear_layer():
    layer = nn.Linear(2, 3)
    with th.no_grad():
        layer.weight.copy_(th.tensor([[3.0, 4.0], [0.0, -0.1], [0.0, 0.0]]))
    assert normalize_fan_in(layer, scale=10.0) is layer
    expected = th.tensor([[6.0, 8.0], [0.0, -10.0], [0.0, 0.0]])  # 3-4-5 triangle; directions and zeros are kept
    th.testing.assert_close(layer.weight.detach(), expected)
    assert layer.bias.tolist() == [0.0, 0.0, 0.0]
    assert layer.weight.requires_grad


def test_fan_in_of_a_convolution_counts_its_whole_kernel():
    layer = nn.Conv2d(1, 1, kernel_size=2, bias=False)
    with th.no_grad():
        layer.weight.fill_(7.0)
    normalize_fan_in(layer)
    assert layer.weight.flatten().tolist() == pytest.approx([0.5] * 4)  # 4 · 0.5² = 1


@pytest.mark.parametrize("scale", [-1.0, float("nan"), float("inf")])
def test_fan_in_refuses_a_scale_that_is_no_norm(scale):
    with pytest.raises(ValueError, match=f"scale must be >= 0, got {scale}"):
        normalize_fan_in(nn.Linear(1, 1), scale)


def test_initial_norms_of_impala():
    extractor = ImpalaCNN(image(3, 64, 64))
    # 3 stages of one convolution and 2 blocks of two. With 6 blocks in all: 6^(-1/4) = 0.63894
    stage = [1.0, 0.63894, 0.63894, 0.63894, 0.63894]
    for layer, norm in zip(convolutions(extractor), stage * 3, strict=True):
        assert unit_norms(layer).tolist() == pytest.approx([norm] * layer.out_channels, abs=1e-5)
    assert unit_norms(extractor.linear[0]).tolist() == pytest.approx([1.4] * 256, abs=1e-5)
    assert all((parameter == 0).all() for name, parameter in extractor.named_parameters() if name.endswith("bias"))


def test_initial_norms_of_another_depth():
    extractor = ImpalaCNN(image(3, 8, 8), channels=[4, 4, 4, 4], n_blocks=4)
    norms = [unit_norms(layer)[0].item() for layer in convolutions(extractor)[:3]]
    assert norms == pytest.approx([1.0, 0.5, 0.5], abs=1e-5)  # 16 blocks in all: 16^(-1/4) = 0.5


@pytest.mark.parametrize("extractor_class", EXTRACTORS)
def test_building_draws_the_numbers_of_the_layers_only(extractor_class):
    space = image(3, 10, 10)
    sampling = space.np_random.bit_generator.state
    th.manual_seed(0)
    extractor = extractor_class(space)
    drawn = th.rand(3)
    th.manual_seed(0)
    for layer in extractor.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.reset_parameters()
    assert th.equal(th.rand(3), drawn)
    assert space.np_random.bit_generator.state == sampling


# Sizes


def test_parameters_of_the_procgen_network():
    extractor = ImpalaCNN(image(3, 64, 64))
    # Kernel 3·3·inputs·outputs and one bias for each output
    stage_1 = (27 * 16 + 16) + 4 * (144 * 16 + 16)  # 448 + 4 · 2320
    stage_2 = (144 * 32 + 32) + 4 * (288 * 32 + 32)  # 4640 + 4 · 9248
    stage_3 = 5 * (288 * 32 + 32)  # 5 · 9248
    dense = 32 * 8 * 8 * 256 + 256  # 64 -> 32 -> 16 -> 8 pixels
    assert n_parameters(extractor.cnn) == stage_1 + stage_2 + stage_3 == 97_600
    assert n_parameters(extractor.linear) == dense == 524_544
    assert n_parameters(extractor) == 622_144


def test_parameters_of_the_minatar_network():
    extractor = SmallGridCNN(grid(10, 10, 4))
    # 3·3·4 weights and a bias for 16 filters; 8·8·16 inputs and a bias for 128 units
    assert n_parameters(extractor) == (36 * 16 + 16) + (1024 * 128 + 128) == 131_792


def test_parameters_of_the_minigrid_network():
    # 3·3·3 weights; 5·5·16 inputs
    assert n_parameters(SmallGridCNN(image(3, 7, 7))) == (27 * 16 + 16) + (400 * 128 + 128) == 51_776


def test_parameters_of_two_convolutions_and_a_large_kernel():
    extractor = SmallGridCNN(grid(10, 12, 2), features_dim=5, channels=[3, 4], kernel_size=5)
    # 5·5·2 inputs for 3 filters, 5·5·3 for 4; of 10x12 cells each convolution takes 4: 2x4 remain
    assert n_parameters(extractor) == (50 * 3 + 3) + (75 * 4 + 4) + (2 * 4 * 4 * 5 + 5)


SHAPES = [
    (84, 84, 4),
    (64, 64, 3),
    (10, 10, 4),
    (10, 10, 6),
    (10, 10, 7),
    (10, 10, 10),
    (7, 7, 3),
    (8, 8, 1),
    (33, 9, 2),
    (5, 12, 3),
    (3, 3, 20),
]
TINY_SHAPES = [(1, 1, 3), (2, 2, 3), (1, 5, 2), (6, 1, 1)]


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(
    ("extractor_class", "shape"),
    [*((cls, shape) for shape in SHAPES for cls in EXTRACTORS), *((ImpalaCNN, shape) for shape in TINY_SHAPES)],
)
def test_any_size_gives_finite_features(extractor_class, shape, channels_last):
    height, width, n_channels = shape
    space = image(*shape) if channels_last else image(n_channels, height, width)
    extractor = extractor_class(space, features_dim=11, channels_last=channels_last)
    assert extractor.features_dim == 11
    assert extractor.image_shape == (n_channels, height, width)
    assert convolutions(extractor)[0].in_channels == n_channels
    for batch_size in (0, 1, 3):
        features = extractor(th.rand(batch_size, *space.shape))
        assert features.shape == (batch_size, 11)
        assert features.isfinite().all()
        assert (features >= 0).all()


def test_default_number_of_features():
    assert ImpalaCNN(image(3, 10, 10)).features_dim == 256
    assert SmallGridCNN(image(3, 10, 10)).features_dim == 128


# Values


def fill(layer: nn.Module, weight: float, bias: float = 0.0) -> None:
    """Set a kernel's middle, the only entry that a one-pixel image uses, to ``weight``, and the rest to 100."""
    with th.no_grad():
        layer.weight.fill_(100.0)
        layer.weight[..., layer.weight.shape[-2] // 2, layer.weight.shape[-1] // 2] = weight
        layer.bias.fill_(bias)


@pytest.mark.parametrize(
    ("pixel", "weight", "dense", "expected"),
    [
        # -6 before the block, which cuts it to 0: 5·0 + 1 = 1, 10·1 = 10, so -6 + 10 = 4, halved
        (3.0, 5.0, 0.5, 2.0),
        # 6 before the block: 5·6 + 1 = 31, 10·31 = 310, so 6 + 310 = 316
        (-3.0, 5.0, 0.5, 158.0),
        # 6 before the block: -5·6 + 1 = -29, cut to 0, so only the 6 remains
        (-3.0, -5.0, 0.5, 3.0),
        # -6 before the block: the 10 from it make 4; the last unit is cut
        (3.0, 5.0, -0.5, 0.0),
        # 0.2 before the block: 5·0.2 + 1 = 2, 10·2 = 20
        (-0.1, 5.0, 0.5, 10.1),
    ],
)
def test_impala_on_one_pixel(pixel, weight, dense, expected):
    extractor = ImpalaCNN(image(1, 1, 1), features_dim=1, channels=[1], n_blocks=1)
    first, in_block, out_block = convolutions(extractor)
    fill(first, -2.0)
    fill(in_block, weight, bias=1.0)
    fill(out_block, 10.0)
    with th.no_grad():
        extractor.linear[0].weight.fill_(dense)
    assert extractor(th.full((1, 1, 1, 1), pixel)).item() == pytest.approx(expected)


def test_impala_cuts_what_is_negative_before_the_dense_layer():
    extractor = ImpalaCNN(image(1, 1, 1), features_dim=1, channels=[1], n_blocks=0)
    fill(convolutions(extractor)[0], 1.0)
    with th.no_grad():
        extractor.linear[0].weight.fill_(-1.0)
    assert extractor(th.full((1, 1, 1, 1), -3.0)).item() == 0.0  # -1 · -3 = 3 without


def test_impala_pools_three_by_three_around_every_second_pixel():
    extractor = ImpalaCNN(image(1, 4, 4), channels=[1], n_blocks=0)
    (convolution,) = convolutions(extractor)
    with th.no_grad():
        convolution.weight.zero_()
        convolution.weight[0, 0, 1, 1] = 1.0
    falling = th.arange(15.0, -1.0, -1.0).view(1, 1, 4, 4)  # rows 15 14 13 12, 11 10 9 8, ...
    # Rows -1 to 1 and 1 to 3, columns likewise; windows of two would give 15, 13, 7, 5
    assert extractor.cnn(falling).tolist() == [[15.0, 14.0, 11.0, 10.0]]


def test_blocks_with_a_last_convolution_of_zero_are_the_identity():
    th.manual_seed(0)
    extractor = ImpalaCNN(image(3, 9, 9), channels=[4, 5], n_blocks=2)
    without = ImpalaCNN(image(3, 9, 9), channels=[4, 5], n_blocks=0)
    layers = convolutions(extractor)
    stages = [layers[0], layers[5]]
    for mine, theirs in zip(convolutions(without), stages, strict=True):
        mine.load_state_dict(theirs.state_dict())
    without.linear.load_state_dict(extractor.linear.state_dict())
    observations = th.rand(2, 3, 9, 9)
    assert not th.allclose(extractor(observations), without(observations))
    for last in (layers[2], layers[4], layers[7], layers[9]):
        nn.init.zeros_(last.weight)
    assert th.equal(extractor(observations), without(observations))


def test_small_grid_network_by_hand():
    extractor = SmallGridCNN(grid(4, 4, 1), features_dim=2, channels=[2])
    with th.no_grad():
        for parameter in extractor.parameters():
            parameter.zero_()
        extractor.cnn[0].weight[0] = 1.0  # sums nine cells
        extractor.cnn[0].weight[1, 0, 1, 1] = -1.0  # minus the middle one: always cut to zero
        extractor.linear[0].weight[0] = 1.0
        extractor.linear[0].weight[1] = -1.0
    observations = th.zeros(1, 4, 4, 1)
    observations[0, 0, 0] = 1.0  # in one of the 2x2 windows
    observations[0, 2, 1] = 1.0  # in all four
    assert extractor(observations).tolist() == [[5.0, 0.0]]


@pytest.mark.parametrize("extractor_class", EXTRACTORS)
@pytest.mark.parametrize("shape", [(10, 10, 4), (7, 7, 3), (6, 9, 1), (10, 10, 10)])
def test_both_orders_of_the_axes_give_the_same_features(extractor_class, shape):
    height, width, n_channels = shape
    last = extractor_class(grid(*shape), channels_last=True)
    first = extractor_class(grid(n_channels, height, width), channels_last=False)
    first.load_state_dict(last.state_dict())
    observations = th.rand(5, *shape)
    transposed = observations.permute(0, 3, 1, 2)
    expected = last(observations)
    th.testing.assert_close(first(transposed), expected)
    th.testing.assert_close(first(transposed.contiguous()), expected)
    assert expected.std() > 0


# Order of the axes


@pytest.mark.parametrize(
    ("space", "channels_last"),
    [
        # Square: the odd axis has the channels, whatever the space is
        (image(84, 84, 4), True),
        (image(4, 84, 84), False),
        (image(1, 84, 84), False),
        (image(84, 84, 1), True),
        (grid(10, 10, 4), True),
        (grid(4, 10, 10), False),
        (spaces.Box(-1, 1, (3, 64, 64), np.float32), False),
        (spaces.Box(-1, 1, (64, 64, 3), np.float32), True),
        (image(1, 1, 3), True),
        (image(3, 1, 1), False),
        # even if it is longer than the image: three stacked frames of MiniGrid, two of Seaquest
        (image(7, 7, 9), True),
        (image(9, 7, 7), False),
        (grid(10, 10, 20), True),
        (grid(20, 10, 10), False),
        # Not square: the smallest has them, if it is the first or the last
        (image(3, 210, 160), False),
        (image(210, 160, 3), True),
        (spaces.Box(-np.inf, np.inf, (60, 80, 4), np.float32), True),
        (spaces.Box(-np.inf, np.inf, (4, 60, 80), np.float32), False),
        # Undecided: SB3's images are channel-first
        (image(10, 10, 10), False),
        (image(20, 3, 12), False),
        (image(10, 4, 10), False),
        (image(10, 12, 10), False),
        # and MinAtar's grids channel-last
        (grid(10, 10, 10), True),
        (grid(20, 3, 12), True),
        (grid(10, 4, 10), True),
        (grid(10, 12, 10), True),
        # An image has the dtype and the bounds of one
        (spaces.Box(0, 1, (10, 10, 10), np.float32), True),
        (spaces.Box(0, 10, (10, 10, 10), np.uint8), True),
    ],
    ids=str,
)
def test_order_of_the_axes(space, channels_last):
    assert is_channels_last(space) is channels_last
    shape = space.shape
    expected = (shape[2], shape[0], shape[1]) if channels_last else shape
    assert ImpalaCNN(space).image_shape == expected


@pytest.mark.parametrize("extractor_class", EXTRACTORS)
def test_given_order_of_the_axes_goes_before_the_guess(extractor_class):
    assert extractor_class(grid(10, 10, 4), channels_last=False).image_shape == (10, 10, 4)
    assert extractor_class(grid(4, 10, 10), channels_last=True).image_shape == (10, 4, 10)


# Refusals


@pytest.mark.parametrize("extractor_class", EXTRACTORS)
@pytest.mark.parametrize(
    ("space", "message"),
    [
        (spaces.Box(-1, 1, (4,)), r"that is a Box with 3 axes, got Box\(-1.0, 1.0, \(4,\)"),
        (image(84, 84), r"that is a Box with 3 axes, got Box.*\(84, 84\)"),
        (image(4, 84, 84, 3), r"that is a Box with 3 axes, got Box.*\(4, 84, 84, 3\)"),
        (spaces.Discrete(3), r"that is a Box with 3 axes, got Discrete\(3\)"),
        (spaces.Dict(image=image(3, 84, 84)), "that is a Box with 3 axes, got Dict"),
        (image(0, 84, 84), r"without empty axes, got Box.*\(0, 84, 84\)"),
    ],
    ids=str,
)
def test_spaces_that_are_no_images(extractor_class, space, message):
    with pytest.raises(ValueError, match=f"{extractor_class.__name__} needs an observation_space {message}"):
        extractor_class(space)


COMMON_ERRORS = [
    ({"features_dim": 0}, ValueError, "features_dim must be >= 1, got 0"),
    ({"features_dim": 2.5}, TypeError, "features_dim must be an integer >= 1, got 2.5"),
    ({"channels": []}, ValueError, r"channels must have at least one number, got \[\]"),
    ({"channels": [16, 0]}, ValueError, "every number in channels must be >= 1, got 0"),
    ({"channels": [16.0]}, TypeError, "every number in channels must be an integer >= 1, got 16.0"),
    ({"channels": "16"}, TypeError, "every number in channels must be an integer >= 1, got '1'"),
    ({"channels": 16}, TypeError, "channels must be a sequence of integers >= 1, got 16"),
    ({"channels_last": "first"}, TypeError, "channels_last must be True, False or None, got 'first'"),
    ({"mixed_precision": "bfloat16"}, TypeError, "mixed_precision must be True or False, got 'bfloat16'"),
]


@pytest.mark.parametrize(
    ("extractor_class", "arguments", "error", "message"),
    [
        *((cls, *case) for cls in EXTRACTORS for case in COMMON_ERRORS),
        (ImpalaCNN, {"n_blocks": -1}, ValueError, "n_blocks must be >= 0, got -1"),
        (ImpalaCNN, {"n_blocks": True}, TypeError, "n_blocks must be an integer >= 0, got True"),
        (SmallGridCNN, {"kernel_size": 0}, ValueError, "kernel_size must be >= 1, got 0"),
        (SmallGridCNN, {"kernel_size": (3, 3)}, TypeError, r"kernel_size must be an integer >= 1, got \(3, 3\)"),
        (
            SmallGridCNN,
            {"kernel_size": 8},
            ValueError,
            r"at least 8x8 for channels=\(16,\) and kernel_size=8, got 7x7 \(shape \(7, 7, 3\), channels_last=True",
        ),
        (SmallGridCNN, {"channels": [8, 8, 8, 8]}, ValueError, "at least 9x9.*got 7x7"),
        (SmallGridCNN, {"channels_last": False, "kernel_size": 4}, ValueError, "at least 4x4.*got 7x3"),
    ],
)
def test_refused_arguments(extractor_class, arguments, error, message):
    with pytest.raises(error, match=message):
        extractor_class(grid(7, 7, 3), **arguments)


def test_smallest_grid_that_is_accepted():
    assert SmallGridCNN(grid(7, 7, 3), kernel_size=7)(th.rand(1, 7, 7, 3)).shape == (1, 128)
    assert SmallGridCNN(grid(7, 7, 3), channels=[8, 8, 8])(th.rand(1, 7, 7, 3)).shape == (1, 128)


# By name


def test_extractors_by_name():
    expected = {FlattenExtractor, NatureCNN, CombinedExtractor, ImpalaCNN, SmallGridCNN}
    assert {features_extractor_class(name) for name in FEATURES_EXTRACTORS} == expected
    assert features_extractor_class("ImpalaCNN") is ImpalaCNN
    assert features_extractor_class("NatureCNN") is NatureCNN


def test_classes_are_passed_through():
    class Custom(BaseFeaturesExtractor):
        pass

    assert features_extractor_class(Custom) is Custom
    assert features_extractor_class(nn.Flatten) is nn.Flatten


def test_unknown_name():
    names = "FlattenExtractor, NatureCNN, CombinedExtractor, ImpalaCNN, SmallGridCNN"
    with pytest.raises(ValueError, match=f"features_extractor_class must be a class or one of {names}, got 'impala'"):
        features_extractor_class("impala")


@pytest.mark.parametrize("value", [None, 3])
def test_neither_name_nor_class(value):
    with pytest.raises(TypeError, match=f"features_extractor_class must be a name or a class, got {value}"):
        features_extractor_class(value)


# In PyTorch and Stable-Baselines3


@pytest.mark.parametrize("extractor_class", EXTRACTORS)
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("mixed_precision", [True, False])
def test_compiles_into_one_graph(extractor_class, channels_last, mixed_precision):
    extractor = extractor_class(grid(7, 7, 7), channels_last=channels_last, mixed_precision=mixed_precision)
    observations = th.rand(2, 7, 7, 7)
    compiled = th.compile(extractor, backend="eager", fullgraph=True)
    th.testing.assert_close(compiled(observations), extractor(observations))


@pytest.mark.parametrize("extractor_class", EXTRACTORS)
def test_double_precision(extractor_class):
    extractor = extractor_class(grid(10, 10, 4))
    observations = th.rand(2, 10, 10, 4)
    single = extractor(observations)
    double = extractor.double()(observations.double())
    assert double.dtype == th.float64
    th.testing.assert_close(double.float(), single, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("extractor_class", EXTRACTORS)
def test_mixed_precision(extractor_class):
    """bfloat16 has 8 significant bits; in gradients, sums over many cells, its errors average out."""
    exact = extractor_class(grid(10, 10, 4))
    mixed = extractor_class(grid(10, 10, 4), mixed_precision=True)
    mixed.load_state_dict(exact.state_dict())
    observations = th.rand(64, 10, 10, 4)
    dtypes = []
    mixed.linear.register_forward_hook(lambda module, inputs, output: dtypes.append((inputs[0].dtype, output.dtype)))
    found, expected = mixed(observations), exact(observations)
    largest = float(expected.detach().max())
    assert dtypes == [(th.bfloat16, th.bfloat16)]
    assert found.dtype == th.float32
    th.testing.assert_close(found, expected, rtol=0.02, atol=0.02 * largest)
    for features in (found, expected):
        features.square().mean().backward()
    for parameter, other in zip(mixed.parameters(), exact.parameters(), strict=True):
        assert parameter.grad.dtype == parameter.dtype == th.float32
        assert th.cosine_similarity(parameter.grad.flatten(), other.grad.flatten(), dim=0) > 0.999
    # Nothing is left of the context: no cast weights, whose updates would be missed, and nothing around is cast.
    with th.no_grad():
        for parameter in mixed.parameters():
            parameter.zero_()
    assert not mixed(observations).any()
    assert (th.ones(1, 1) @ th.ones(1, 1)).dtype == th.float32


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        pytest.param(PPO, {}, id="PPO"),
        pytest.param(PPOEWMA, {}, id="PPOEWMA"),
        pytest.param(PPG, {}, id="PPG"),
        pytest.param(PPOEWMA, {"torch_compile": True}, id="compiled", marks=pytest.mark.slow),
    ],
)
def test_training_in_mixed_precision(algorithm, options, tmp_path):
    policy = PPGImpalaPolicy if algorithm is PPG else ImpalaPolicy
    own = {"n_policy_iterations": 1, "aux_batch_size": 16} if algorithm is PPG else {}
    extractor = {"features_dim": 16, "channels": [4], "n_blocks": 1, "mixed_precision": True}
    model = algorithm(policy, RandomImages(image(3, 8, 8)), n_steps=32, batch_size=16, n_epochs=1, seed=0,
                      policy_kwargs={"features_extractor_kwargs": extractor}, **own, **options)  # fmt: skip
    before = {name: value.clone() for name, value in model.policy.state_dict().items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="torch_compile=.* has no effect")
        model.learn(32)
    after = model.policy.state_dict()
    assert {value.dtype for value in after.values()} == {th.float32}
    assert all(value.isfinite().all() and not th.equal(value, before[name]) for name, value in after.items())
    model.save(tmp_path / "agent")
    loaded = algorithm.load(tmp_path / "agent")
    assert loaded.policy.pi_features_extractor.mixed_precision
    observations = np.stack([image(3, 8, 8).sample() for _ in range(8)])
    np.testing.assert_array_equal(loaded.predict(observations, deterministic=True)[0],
                                  model.predict(observations, deterministic=True)[0])  # fmt: skip


@pytest.mark.parametrize("extractor_class", EXTRACTORS)
def test_other_devices_than_the_cpu(extractor_class):
    extractor = extractor_class(grid(10, 10, 4)).to("meta")  # shapes only
    assert extractor(th.empty(2, 10, 10, 4, device="meta")).shape == (2, extractor.features_dim)


@pytest.mark.parametrize("extractor_class", EXTRACTORS)
def test_state_is_saved_and_loaded(extractor_class, tmp_path):
    space = grid(10, 10, 4)
    extractor, other = extractor_class(space), extractor_class(space)
    observations = th.rand(2, 10, 10, 4)
    assert not th.equal(extractor(observations), other(observations))
    th.save(extractor.state_dict(), tmp_path / "extractor.pth")
    other.load_state_dict(th.load(tmp_path / "extractor.pth", weights_only=True))
    assert th.equal(extractor(observations), other(observations))


class RandomImages(gym.Env):
    """
    Observations are noise; one of two actions is rewarded.

    :param observation_space: space to draw the observations from
    """

    def __init__(self, observation_space: spaces.Box) -> None:
        self.observation_space = observation_space
        self.action_space = spaces.Discrete(2)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), float(action == 0), self.np_random.random() < 0.2, False, {}


def minatar(game: str) -> gym.Env:
    minatar_gym = pytest.importorskip("minatar.gym")
    if f"MinAtar/{game}-v1" not in gym.registry:
        minatar_gym.register_envs()
    return gym.make(f"MinAtar/{game}-v1")


def minigrid() -> gym.Env:
    wrappers = pytest.importorskip("minigrid.wrappers")
    return wrappers.ImgObsWrapper(gym.make("MiniGrid-Empty-5x5-v0"))


def stacked_minigrid() -> VecFrameStack:
    return VecFrameStack(DummyVecEnv([minigrid]), n_stack=3)


@pytest.mark.parametrize("policy", ["CnnPolicy", "MlpPolicy"])
@pytest.mark.parametrize("extractor_class", EXTRACTORS)
@pytest.mark.parametrize(
    ("make_env", "image_shape"),
    [
        pytest.param(lambda: RandomImages(image(12, 14, 3)), (3, 12, 14), id="channel-last image"),
        pytest.param(lambda: RandomImages(image(3, 12, 14)), (3, 12, 14), id="channel-first image"),
        pytest.param(lambda: minatar("SpaceInvaders"), (6, 10, 10), id="SpaceInvaders"),
        pytest.param(lambda: minatar("Seaquest"), (10, 10, 10), id="Seaquest"),
        pytest.param(minigrid, (3, 7, 7), id="MiniGrid"),
        pytest.param(stacked_minigrid, (9, 7, 7), id="stacked MiniGrid"),
    ],
)
def test_trains_in_ppo(policy, extractor_class, make_env, image_shape):
    kwargs = {"features_extractor_class": extractor_class, "features_extractor_kwargs": {"features_dim": 16}}
    model = PPO(policy, make_env(), n_steps=16, batch_size=8, n_epochs=1, policy_kwargs=kwargs, seed=0)
    extractor = model.policy.features_extractor
    assert extractor.image_shape == image_shape
    before = [parameter.detach().clone() for parameter in extractor.parameters()]
    model.learn(16)
    after = list(extractor.parameters())
    assert all(not th.equal(a, b) for a, b in zip(before, after, strict=True))  # the gradient reaches every layer
    observation = model.get_env().reset()
    assert model.predict(observation)[0].shape == (1,)


def test_channels_of_minatar_are_its_last_axis():
    """The output of a convolution over cells moves with the input; over cells and channels it would not."""
    model = PPO("MlpPolicy", minatar("Seaquest"), policy_kwargs={"features_extractor_class": SmallGridCNN})
    convolution = model.policy.features_extractor.cnn
    observation = th.zeros(2, 10, 10, 10)
    observation[0, 2, 3, 7] = 1.0
    observation[1, 4, 6, 7] = 1.0  # two down and three right, in the same channel
    here, moved = convolution(observation.permute(0, 3, 1, 2)).view(2, 16, 8, 8).detach()
    th.testing.assert_close(moved[:, 2:, 3:], here[:, :-2, :-3])
    by_extractor = model.policy.extract_features(observation, model.policy.features_extractor)
    by_hand = model.policy.features_extractor.linear(convolution(observation.permute(0, 3, 1, 2)))
    th.testing.assert_close(by_extractor, by_hand)


@pytest.mark.parametrize("ortho_init", [True, False])
def test_orthogonal_initialisation_of_sb3_replaces_ours(ortho_init):
    kwargs = {"features_extractor_class": ImpalaCNN, "ortho_init": ortho_init}
    model = PPO("CnnPolicy", RandomImages(image(3, 12, 14)), policy_kwargs=kwargs)
    dense = unit_norms(model.policy.features_extractor.linear[0])
    # SB3's: the weights of the 32·2·2 = 128 inputs are orthogonal with norm √2, shared out among 256 units
    mean_square = 128 * 2 / 256 if ortho_init else 1.4**2
    assert dense.square().mean().item() == pytest.approx(mean_square, rel=1e-4)


def test_policy_is_saved_and_loaded(tmp_path):
    kwargs = {
        "features_extractor_class": ImpalaCNN,
        "features_extractor_kwargs": {"features_dim": 8, "channels": [4, 6], "n_blocks": 1, "channels_last": False},
    }
    model = PPO("MlpPolicy", RandomImages(grid(10, 10, 4)), policy_kwargs=kwargs)
    model.policy.save(tmp_path / "policy.zip")
    loaded = ActorCriticPolicy.load(tmp_path / "policy.zip")
    assert loaded.features_extractor.image_shape == (10, 10, 4)
    observations = th.rand(3, 10, 10, 4)
    with th.no_grad():
        assert th.equal(loaded.predict_values(observations), model.policy.predict_values(observations))
