"""Policies with an auxiliary value head, a critic architecture, a trunk, a softplus standard deviation; IMPALA."""

import copy
import math
import pathlib
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib.common.wrappers import ActionMasker
from stable_baselines3.common.distributions import DiagGaussianDistribution
from stable_baselines3.common.policies import (
    ActorCriticCnnPolicy,
    ActorCriticPolicy,
    MultiInputActorCriticPolicy,
)
from stable_baselines3.common.torch_layers import CombinedExtractor, MlpExtractor, NatureCNN
from torch import nn

from sb3_ppo_ewma import (
    PPG,
    PPGEWMA,
    PPOEWMA,
    ImpalaCNN,
    ImpalaPolicy,
    MaskablePPOEWMA,
    PPGCnnPolicy,
    PPGImpalaPolicy,
    PPGMultiInputPolicy,
    PPGPolicy,
    RecurrentPPOEWMA,
    SmallGridCNN,
)
from sb3_ppo_ewma.distributions import SoftplusDiagGaussianDistribution
from tests.battery.envs import OBSERVATION_SPACES, SpaceEnv
from tests.battery.helpers import assert_same

VECTOR, IMAGE = OBSERVATION_SPACES["vector"], OBSERVATION_SPACES["image_channels_first"]
DICT = spaces.Dict({"image": IMAGE, "vector": VECTOR, "multibinary": spaces.MultiBinary(4)})
BOX, DISCRETE = spaces.Box(-1, 1, (2,)), spaces.Discrete(3)
ARCHITECTURES = ["dual", "shared", "detach"]
IMPALA = {"features_extractor_kwargs": {"channels": (4,), "n_blocks": 1, "features_dim": 6}}

# Policies with weights in the trunk: class, observation space, arguments
POLICIES: dict[str, tuple[type[PPGPolicy], spaces.Space, dict[str, Any]]] = {
    "vector": (PPGPolicy, VECTOR, {"trunk_arch": [6]}),
    "image": (PPGCnnPolicy, IMAGE, {"features_extractor_kwargs": {"features_dim": 6}}),
    "image and trunk": (PPGCnnPolicy, IMAGE, {"features_extractor_kwargs": {"features_dim": 6}, "trunk_arch": [6, 5]}),
    "dict": (PPGMultiInputPolicy, DICT, {"features_extractor_kwargs": {"cnn_output_dim": 6}}),
    "impala": (PPGImpalaPolicy, IMAGE, {**IMPALA, "net_arch": [6]}),
}


def learning_rate(_: float) -> float:
    """The learning rate schedule of all policies here."""
    return 0.01


def build(cls: type, observation_space: spaces.Space, action_space: spaces.Space = BOX, **kwargs: Any) -> Any:
    """:return: a small policy, the same each time"""
    th.manual_seed(0)
    return cls(observation_space, action_space, learning_rate, **{"net_arch": [6], **kwargs})


def observations(space: spaces.Space, n: int = 4) -> Any:
    """:return: a batch, the same each time"""
    space.seed(0)
    samples = [space.sample() for _ in range(n)]
    if isinstance(space, spaces.Dict):
        return {key: th.as_tensor(np.stack([sample[key] for sample in samples])) for key in space.spaces}
    return th.as_tensor(np.stack(samples))


def parts_with_gradient(policy: Any, output: th.Tensor) -> set[str]:
    """
    :param policy: policy that computed the output
    :param output: tensor to sum and differentiate
    :return: parts of the policy that the gradient reaches, each with all its parameters
    """
    policy.zero_grad()
    output.sum().backward()
    reached: dict[str, set[bool]] = {}
    for name, parameter in policy.named_parameters():
        part = name.split(".")[1 if name.startswith("mlp_extractor.") else 0]
        reached.setdefault(part, set()).add(parameter.grad is not None)
    assert all(len(values) == 1 for values in reached.values())
    return {part for part, (value,) in reached.items() if value}


# ---------------------------------------------------------------------- critic architectures


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("critic_arch", ARCHITECTURES)
def test_what_each_loss_trains(critic_arch: str, name: str) -> None:
    cls, space, kwargs = POLICIES[name]
    policy = build(cls, space, critic_arch=critic_arch, **kwargs)
    obs, actions = observations(space), th.zeros(4, 2)
    # "features_extractor" is the policy's trunk, "vf_features_extractor" the one of a dual critic.
    actor = {"features_extractor", "policy_net", "action_net", "log_std"}
    critic = {"value_net"} | {
        "dual": {"vf_features_extractor"},
        "shared": {"features_extractor"},
        "detach": set(),
    }[critic_arch]
    _, log_prob, _ = policy.evaluate_actions(obs, actions)
    assert parts_with_gradient(policy, log_prob) == actor
    values, _, _ = policy.evaluate_actions(obs, actions)
    assert parts_with_gradient(policy, values) == critic
    # The auxiliary phase
    distribution, _, _ = policy.evaluate_auxiliary(obs)
    assert parts_with_gradient(policy, distribution.log_prob(actions)) == actor
    _, values, _ = policy.evaluate_auxiliary(obs)
    assert parts_with_gradient(policy, values) == critic
    _, _, aux_values = policy.evaluate_auxiliary(obs)
    assert parts_with_gradient(policy, aux_values) == {"features_extractor", "policy_net", "aux_value_net"}


@pytest.mark.parametrize("critic_arch", ARCHITECTURES)
def test_the_gradient_that_is_not_stopped_is_not_zero(critic_arch: str) -> None:
    policy = build(PPGPolicy, VECTOR, trunk_arch=[6], critic_arch=critic_arch)
    _, values, aux_values = policy.evaluate_auxiliary(observations(VECTOR))
    weight = policy.features_extractor.mlp[0].weight
    aux_values.sum().backward(retain_graph=True)
    assert weight.grad.abs().sum() > 0
    policy.zero_grad()
    values.sum().backward()
    assert (weight.grad is not None) == (critic_arch == "shared")


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("critic_arch", ARCHITECTURES)
def test_the_auxiliary_evaluation_sees_the_same_policy(critic_arch: str, name: str) -> None:
    cls, space, kwargs = POLICIES[name]
    policy = build(cls, space, critic_arch=critic_arch, **kwargs)
    obs, actions = observations(space), th.rand(4, 2)
    with th.no_grad():
        values, log_prob, _ = policy.evaluate_actions(obs, actions)
        distribution, aux_phase_values, aux_values = policy.evaluate_auxiliary(obs)
        assert th.equal(distribution.log_prob(actions), log_prob)
        assert th.equal(aux_phase_values, values.flatten())
        assert th.equal(policy.predict_values(obs), values)
        assert th.equal(policy(obs)[1], values)
        features = policy.extract_features(obs)
        latent = policy.mlp_extractor.forward_actor(features[0] if critic_arch == "dual" else features)
        assert th.allclose(aux_values, latent @ policy.aux_value_net.weight[0] + policy.aux_value_net.bias)
    assert values.shape == (4, 1)
    assert aux_phase_values.shape == aux_values.shape == (4,)


def test_which_trunks_there_are() -> None:
    for critic_arch in ARCHITECTURES:
        policy = build(PPGPolicy, VECTOR, trunk_arch=[6], critic_arch=critic_arch)
        shares = critic_arch != "dual"
        assert (policy.pi_features_extractor is policy.vf_features_extractor) == shares
        assert policy.share_features_extractor == shares
    assert build(PPGPolicy, VECTOR).critic_arch == "dual"


def test_shared_and_detached_start_with_the_same_weights() -> None:
    shared, detached = (build(PPGPolicy, VECTOR, trunk_arch=[6], critic_arch=arch) for arch in ("shared", "detach"))
    assert_same(dict(shared.state_dict()), dict(detached.state_dict()))


def train(**policy_kwargs: Any) -> dict[str, th.Tensor]:
    """:return: the policy's parameters after two phases and a rollout"""
    model = PPG(
        "MlpPolicy",
        SpaceEnv(action_space="box"),
        n_steps=16,
        batch_size=8,
        n_policy_iterations=2,
        n_aux_epochs=2,
        learning_rate=0.01,
        seed=0,
        policy_kwargs={"net_arch": [8], **policy_kwargs},
    )
    return dict(model.learn(5 * 16).policy.state_dict())


@pytest.mark.long
def test_without_weights_in_the_trunk_the_architectures_coincide() -> None:
    dual, shared, detach = (train(critic_arch=critic_arch) for critic_arch in ARCHITECTURES)
    assert_same(dual, shared)
    assert_same(dual, detach)
    # With weights they do not.
    weights = [train(critic_arch=arch, trunk_arch=[4])["features_extractor.mlp.0.weight"] for arch in ARCHITECTURES]
    assert not any(th.equal(weights[i], weights[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"critic_arch": "dual", "share_features_extractor": True}, "share_features_extractor=True .*'dual'"),
        ({"critic_arch": "shared", "share_features_extractor": False}, "share_features_extractor=False .*'shared'"),
        ({"critic_arch": "detach", "share_features_extractor": False}, "share_features_extractor=False .*'detach'"),
        ({"critic_arch": "single"}, "critic_arch must be one of 'dual', 'shared', 'detach', got 'single'"),
        ({"std_activation": "relu"}, "std_activation must be one of 'exp', 'softplus', got 'relu'"),
        ({"trunk_arch": [8, 0]}, "trunk_arch must be >= 1, got 0"),
    ],
    ids=str,
)
def test_refused_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(PPGPolicy, VECTOR, **kwargs)
    with pytest.raises(ValueError, match=message):
        PPG("MlpPolicy", SpaceEnv(action_space="box"), policy_kwargs=kwargs)


@pytest.mark.parametrize("trunk_arch", [["8"], [1.5]], ids=str)
def test_layers_that_are_no_integers(trunk_arch: Any) -> None:
    with pytest.raises(TypeError, match="trunk_arch must be an integer"):
        build(PPGPolicy, VECTOR, trunk_arch=trunk_arch)


def test_sharing_may_be_given_if_it_agrees() -> None:
    assert not build(PPGPolicy, VECTOR, share_features_extractor=False).share_features_extractor
    for critic_arch in ("shared", "detach"):
        policy = build(PPGPolicy, VECTOR, critic_arch=critic_arch, share_features_extractor=True)
        assert policy.share_features_extractor


def test_layers_of_the_trunk() -> None:
    policy = build(PPGPolicy, VECTOR, trunk_arch=[3, 2], activation_fn=nn.ReLU, net_arch={"pi": [7], "vf": [5]})
    for trunk in (policy.pi_features_extractor, policy.vf_features_extractor):
        layers = [layer for layer in trunk.mlp if isinstance(layer, nn.Linear)]
        assert [tuple(layer.weight.shape) for layer in layers] == [(3, 3), (2, 3)]
        assert [type(layer) for layer in trunk.mlp] == [nn.Linear, nn.ReLU] * 2
        for layer in layers:  # orthogonal with gain √2, as SB3's features extractors
            assert th.allclose(layer.weight @ layer.weight.T, 2 * th.eye(layer.weight.shape[0]), atol=1e-5)
    assert policy.features_dim == 2
    assert [layer.in_features for layer in (policy.action_net, policy.value_net, policy.aux_value_net)] == [7, 5, 7]


# ---------------------------------------------------------------------- auxiliary head

SB3_POLICIES: dict[type, type[ActorCriticPolicy]] = {
    PPGPolicy: ActorCriticPolicy,
    PPGCnnPolicy: ActorCriticCnnPolicy,
    PPGMultiInputPolicy: MultiInputActorCriticPolicy,
    PPGImpalaPolicy: ImpalaPolicy,
}


@pytest.mark.parametrize("name", ["vector", "image", "dict", "impala"])
@pytest.mark.parametrize("critic_arch", ARCHITECTURES)
@pytest.mark.parametrize("kwargs", [{}, {"use_sde": True}, {"ortho_init": False}], ids=str)
def test_the_head_leaves_no_trace(name: str, critic_arch: str, kwargs: dict[str, Any]) -> None:
    """The other weights, and the random numbers after building, are those of SB3's policy."""
    cls, space, own_kwargs = POLICIES[name]
    kwargs = {**kwargs, **{key: value for key, value in own_kwargs.items() if key != "trunk_arch"}}
    shares = critic_arch != "dual"
    reference = build(SB3_POLICIES[cls], space, share_features_extractor=shares, **kwargs)
    state = th.get_rng_state()
    policy = build(cls, space, critic_arch=critic_arch, **kwargs)
    assert th.equal(th.get_rng_state(), state)
    own = policy.state_dict()
    assert_same({key: own[key] for key in reference.state_dict()}, dict(reference.state_dict()))
    assert list(own)[-2:] == ["aux_value_net.weight", "aux_value_net.bias"]
    assert len(own) == len(reference.state_dict()) + 2


def test_the_head_is_part_of_the_optimizer() -> None:
    kwargs = {"optimizer_class": th.optim.AdamW, "optimizer_kwargs": {"weight_decay": 0.5}}
    for critic_arch in ARCHITECTURES:
        policy = build(PPGPolicy, VECTOR, critic_arch=critic_arch, trunk_arch=[4], **kwargs)
        (group,) = policy.optimizer.param_groups
        assert [id(parameter) for parameter in group["params"]] == [id(parameter) for parameter in policy.parameters()]
        assert id(policy.aux_value_net.weight) in map(id, group["params"])
        assert type(policy.optimizer) is th.optim.AdamW
        assert (group["weight_decay"], group["lr"]) == (0.5, 0.01)


def row_norms(layer: nn.Linear) -> th.Tensor:
    """:return: norm of the weights of each output, (outputs,)"""
    return layer.weight.detach().norm(dim=1)


def test_initial_heads() -> None:
    policy = build(PPGPolicy, VECTOR)
    assert row_norms(policy.aux_value_net) == pytest.approx(1)  # orthogonal with gain 1, as SB3's value head
    assert policy.aux_value_net.bias == 0
    assert build(PPGPolicy, VECTOR, ortho_init=False).aux_value_net.bias != 0  # as torch builds it


# ---------------------------------------------------------------------- IMPALA


@pytest.mark.parametrize("action_space", [BOX, DISCRETE], ids=["box", "discrete"])
@pytest.mark.parametrize("cls", [ImpalaPolicy, PPGImpalaPolicy])
def test_initial_heads_of_impala(cls: type, action_space: spaces.Space) -> None:
    policy = build(cls, IMAGE, action_space, net_arch=None, **IMPALA)
    heads = [policy.action_net, policy.value_net, *([policy.aux_value_net] if cls is PPGImpalaPolicy else [])]
    for head in heads:
        assert head.in_features == 6  # no layers in between
        assert row_norms(head) == pytest.approx(0.1)
        assert not head.bias.any()
    assert row_norms(policy.features_extractor.linear[0]) == pytest.approx(1.4)  # not overwritten

    orthogonal = build(cls, IMAGE, action_space, ortho_init=True, **IMPALA)
    assert row_norms(orthogonal.action_net) == pytest.approx(0.01)
    assert row_norms(orthogonal.value_net) == pytest.approx(1)
    assert row_norms(orthogonal.features_extractor.linear[0]) == pytest.approx(math.sqrt(2))
    if cls is PPGImpalaPolicy:
        assert row_norms(orthogonal.aux_value_net) == pytest.approx(1)


def test_small_heads_with_gsde() -> None:
    policy = build(PPGImpalaPolicy, IMAGE, use_sde=True, **IMPALA)
    assert row_norms(policy.action_net) == pytest.approx(0.1)


def test_the_network_of_the_paper_by_its_name() -> None:
    env = SpaceEnv(OBSERVATION_SPACES["image_channels_last"])
    for cls, policy_class in ((PPOEWMA, ImpalaPolicy), (PPG, PPGImpalaPolicy), (PPGEWMA, PPGImpalaPolicy)):
        model = cls("ImpalaPolicy", env, n_steps=16, batch_size=16)
        assert type(model.policy) is policy_class
        assert isinstance(model.policy.features_extractor, ImpalaCNN)
        assert model.policy.action_net.in_features == 256


def test_another_extractor_behind_the_small_heads() -> None:
    space = spaces.Box(0, 1, (5, 5, 4), np.bool_)
    for cls in (ImpalaPolicy, PPGImpalaPolicy):
        policy = build(cls, space, DISCRETE, net_arch=[], features_extractor_class=SmallGridCNN)
        assert isinstance(policy.features_extractor, SmallGridCNN)
        assert row_norms(policy.value_net) == pytest.approx(0.1)


# ---------------------------------------------------------------------- saving


def outputs(policy: Any, space: spaces.Space) -> list[th.Tensor]:
    """:return: a policy's outputs for some observations"""
    obs, outputs = observations(space), []
    with th.no_grad():
        actions, values, log_prob = policy(obs, deterministic=True)
        outputs += [actions, values, log_prob, policy.evaluate_actions(obs, actions)[2]]
        if isinstance(policy, PPGPolicy):
            outputs += policy.evaluate_auxiliary(obs)[1:]
    return outputs


def assert_comes_back(policy: Any, space: spaces.Space, path: pathlib.Path) -> Any:
    """:return: the policy, loaded from a file"""
    with th.no_grad():  # away from where every policy starts
        for parameter in policy.parameters():
            parameter.add_(0.1 * th.randn_like(parameter))
    policy.save(path)
    loaded = type(policy).load(path)
    assert type(loaded) is type(policy)
    assert_same(dict(loaded.state_dict()), dict(policy.state_dict()))
    assert_same(outputs(loaded, space), outputs(policy, space))
    return loaded


@pytest.mark.parametrize("std_activation", ["exp", "softplus"])
@pytest.mark.parametrize("critic_arch", ARCHITECTURES)
@pytest.mark.parametrize("name", POLICIES)
def test_policy_comes_back_from_a_file(
    name: str, critic_arch: str, std_activation: str, tmp_path: pathlib.Path
) -> None:
    cls, space, kwargs = POLICIES[name]
    policy = build(cls, space, critic_arch=critic_arch, std_activation=std_activation, **kwargs)
    loaded = assert_comes_back(policy, space, tmp_path / "policy.pkl")
    # The gradient is stopped as before.
    _, values, _ = loaded.evaluate_auxiliary(observations(space))
    shares = critic_arch == "shared"
    assert ("features_extractor" in parts_with_gradient(loaded, values)) == shares


@pytest.mark.parametrize("share", [True, False])
def test_impala_policy_comes_back_from_a_file(share: bool, tmp_path: pathlib.Path) -> None:
    policy = build(ImpalaPolicy, IMAGE, share_features_extractor=share, **IMPALA)
    loaded = assert_comes_back(policy, IMAGE, tmp_path / "policy.pkl")
    assert loaded.share_features_extractor == share


@pytest.mark.parametrize("critic_arch", ARCHITECTURES)
def test_policy_of_a_model_comes_back(critic_arch: str, tmp_path: pathlib.Path) -> None:
    """Named by an alias, with an extractor named by a string."""
    env = SpaceEnv(spaces.Box(0, 1, (5, 5, 4), np.bool_), "box")
    policy_kwargs = {
        "critic_arch": critic_arch,
        "features_extractor_class": "SmallGridCNN",
        "trunk_arch": [4],
        "std_activation": "softplus",
    }
    model = PPGEWMA("MlpPolicy", env, n_steps=16, batch_size=8, n_policy_iterations=2, policy_kwargs=policy_kwargs)
    model.learn(48)
    for policy in (model.policy, model.proximal_policy):
        policy.save(tmp_path / "policy.pkl")
        loaded = PPG.policy_aliases["MlpPolicy"].load(tmp_path / "policy.pkl")
        assert_same(outputs(loaded, env.observation_space), outputs(policy, env.observation_space))
    model.save(tmp_path / "model")
    loaded_model = PPGEWMA.load(tmp_path / "model")
    assert isinstance(loaded_model.policy.pi_features_extractor.extractor, SmallGridCNN)
    assert_same(outputs(loaded_model.policy, env.observation_space), outputs(model.policy, env.observation_space))


@pytest.mark.parametrize("critic_arch", ARCHITECTURES)
def test_policy_is_copied(critic_arch: str) -> None:
    policy = build(PPGPolicy, VECTOR, critic_arch=critic_arch, trunk_arch=[4])
    twin = copy.deepcopy(policy)
    assert_same(outputs(twin, VECTOR), outputs(policy, VECTOR))
    assert not set(map(id, twin.parameters())) & set(map(id, policy.parameters()))


# ---------------------------------------------------------------------- softplus


@pytest.mark.parametrize("log_std_init", [-10.0, -3.0, -1.0, 0.0, 1.0, 4.0])
def test_initial_standard_deviation(log_std_init: float) -> None:
    policy = build(PPGPolicy, VECTOR, log_std_init=log_std_init, std_activation="softplus")
    stddev = policy.get_distribution(observations(VECTOR)).distribution.stddev.detach()
    assert stddev.shape == (4, 2)
    assert stddev.numpy() == pytest.approx(math.exp(log_std_init), rel=1e-5)


def test_softplus_by_hand() -> None:
    # log(1 + e⁰) = log 2 = 0.693147, and log(1 + e^x) = 2 for x = log(e² − 1)
    parameter = th.tensor([0.0, math.log(math.exp(2) - 1)])
    means = th.tensor([[0.0, 1.0]])
    distribution = SoftplusDiagGaussianDistribution(2).proba_distribution(means, parameter)
    assert distribution.distribution.stddev[0].tolist() == pytest.approx([0.693147, 2.0], rel=1e-5)
    # One and two standard deviations from the means: −½·1² − ½·2² − log 0.693147 − log 2 − log 2π
    log_prob = distribution.log_prob(th.tensor([[0.693147, 5.0]]))
    assert log_prob.item() == pytest.approx(-0.5 - 2 + 0.366513 - 0.693147 - 1.837877, rel=1e-5)
    # Each dimension has ½ + ½ log 2π + log σ = 1.418939 + log σ.
    assert distribution.entropy().item() == pytest.approx(2 * 1.418939 - 0.366513 + 0.693147, rel=1e-5)
    assert distribution.mode().tolist() == [[0.0, 1.0]]


def test_softplus_samples() -> None:
    distribution = SoftplusDiagGaussianDistribution(1)
    th.manual_seed(0)
    actions = distribution.actions_from_params(th.full((10_000, 1), 3.0), th.zeros(1))
    # The standard error of the mean is 0.007, that of the standard deviation 0.005.
    assert actions.mean().item() == pytest.approx(3, abs=0.035)
    assert actions.std().item() == pytest.approx(0.693, abs=0.025)


def test_softplus_is_positive_and_gentle() -> None:
    parameter = th.tensor([-80.0, 80.0], requires_grad=True)
    distribution = SoftplusDiagGaussianDistribution(2).proba_distribution(th.zeros(1, 2), parameter)
    small, large = distribution.distribution.stddev[0]
    assert 0 < small.item() < 1e-30
    assert large.item() == pytest.approx(80)
    large.backward()
    assert parameter.grad.tolist() == [0, 1]  # that of the exponential would be e⁸⁰


@pytest.mark.parametrize(
    ("action_space", "kwargs"),
    [
        (DISCRETE, {}),
        (spaces.MultiDiscrete([2, 3]), {}),
        (spaces.MultiBinary(2), {}),
        (BOX, {"use_sde": True}),
        (BOX, {"use_sde": True, "squash_output": True}),
    ],
    ids=str,
)
def test_softplus_is_refused(action_space: spaces.Space, kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="std_activation='softplus' needs a Box action space and use_sde=False"):
        build(PPGPolicy, VECTOR, action_space, std_activation="softplus", **kwargs)


@pytest.mark.parametrize("std_activation", ["exp", "softplus"])
def test_logged_standard_deviation(std_activation: str) -> None:
    model = PPGEWMA(
        "MlpPolicy",
        SpaceEnv(action_space="box"),
        learning_rate=0.0,
        n_steps=16,
        batch_size=8,
        policy_kwargs={"std_activation": std_activation, "log_std_init": -1.0},
    ).learn(16)
    assert model.logger.name_to_value["train/std"] == pytest.approx(0.367879, rel=1e-5)
    # The average has the same distribution.
    stddev = model.proximal_policy.get_distribution(observations(VECTOR)).distribution.stddev
    assert stddev.detach().numpy() == pytest.approx(0.367879, rel=1e-4)


def test_the_default_is_sb3s_exponential() -> None:
    assert type(build(PPGPolicy, VECTOR).action_dist) is DiagGaussianDistribution


# ---------------------------------------------------------------------- extractors by name

GRID = SpaceEnv(spaces.Box(0, 1, (5, 5, 4), np.bool_))
IMAGES = SpaceEnv(OBSERVATION_SPACES["image_channels_last"])
DICTS = SpaceEnv(OBSERVATION_SPACES["dict"])
MASKED = ActionMasker(GRID, lambda _: np.array([True, False, True]))
BY_NAME: list[tuple[type, str, Any, str, type]] = [
    (PPOEWMA, "MlpPolicy", GRID, "SmallGridCNN", SmallGridCNN),
    (PPOEWMA, "CnnPolicy", IMAGES, "ImpalaCNN", ImpalaCNN),
    (PPOEWMA, "MultiInputPolicy", DICTS, "CombinedExtractor", CombinedExtractor),
    (PPG, "MlpPolicy", GRID, "ImpalaCNN", ImpalaCNN),
    (PPG, "ImpalaPolicy", IMAGES, "NatureCNN", NatureCNN),
    (PPGEWMA, "CnnPolicy", IMAGES, "SmallGridCNN", SmallGridCNN),
    (RecurrentPPOEWMA, "MlpLstmPolicy", GRID, "SmallGridCNN", SmallGridCNN),
    (RecurrentPPOEWMA, "CnnLstmPolicy", IMAGES, "ImpalaCNN", ImpalaCNN),
    (MaskablePPOEWMA, "MlpPolicy", MASKED, "SmallGridCNN", SmallGridCNN),
]


@pytest.mark.parametrize(
    ("cls", "policy", "env", "name", "extractor"),
    BY_NAME,
    ids=lambda value: getattr(value, "__name__", value) if isinstance(value, (str, type)) else "",
)
def test_extractors_by_name(
    cls: type, policy: str, env: Any, name: str, extractor: type, tmp_path: pathlib.Path
) -> None:
    small = {"cnn_output_dim": 4} if name == "CombinedExtractor" else {"features_dim": 4}
    policy_kwargs = {"features_extractor_class": name, "features_extractor_kwargs": small}
    given = dict(policy_kwargs)
    model = cls(policy, env, n_steps=8, batch_size=8, n_epochs=1, policy_kwargs=policy_kwargs)
    assert policy_kwargs == given  # what the user gave is as it was
    assert type(model.policy.features_extractor) is extractor
    model.learn(8).save(tmp_path / "model")
    loaded = cls.load(tmp_path / "model", env=env)
    assert type(loaded.policy.features_extractor) is extractor
    loaded.learn(8)


@pytest.mark.parametrize("cls", [PPOEWMA, PPG, RecurrentPPOEWMA, MaskablePPOEWMA])
def test_unknown_extractors(cls: type) -> None:
    policy = "MlpLstmPolicy" if cls is RecurrentPPOEWMA else "MlpPolicy"
    with pytest.raises(ValueError, match=r"features_extractor_class must be .*'ImpalaCnn'"):
        cls(policy, GRID, policy_kwargs={"features_extractor_class": "ImpalaCnn"})


# ---------------------------------------------------------------------- own networks


class OwnNetwork(nn.Module):
    """
    A custom network with the attributes and methods that SB3's documentation asks for.

    :param features_dim: number of features
    """

    latent_dim_pi, latent_dim_vf = 5, 7

    def __init__(self, features_dim: int) -> None:
        super().__init__()
        self.policy_net = nn.Sequential(nn.Linear(features_dim, 5), nn.ReLU())
        self.value_net = nn.Sequential(nn.Linear(features_dim, 7), nn.ReLU())

    def forward(self, features: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        return self.forward_actor(features), self.forward_critic(features)

    def forward_actor(self, features: th.Tensor) -> th.Tensor:
        return self.policy_net(features)

    def forward_critic(self, features: th.Tensor) -> th.Tensor:
        return self.value_net(features)


class PolicyWithOwnNetwork(PPGPolicy):
    """Builds a custom network."""

    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor = OwnNetwork(self.features_dim)


@pytest.mark.parametrize("critic_arch", ["dual", "shared"])
def test_own_networks(critic_arch: str, tmp_path: pathlib.Path) -> None:
    policy = build(PolicyWithOwnNetwork, VECTOR, critic_arch=critic_arch, trunk_arch=[4])
    _, values, _ = policy.evaluate_auxiliary(observations(VECTOR))
    assert policy.aux_value_net.in_features == 5
    trunk = {"dual": "vf_features_extractor", "shared": "features_extractor"}[critic_arch]
    assert parts_with_gradient(policy, values) == {trunk, "value_net"}
    assert_comes_back(policy, VECTOR, tmp_path / "policy.pkl")
    model = PPG(PolicyWithOwnNetwork, SpaceEnv(), n_steps=8, batch_size=8, n_policy_iterations=1, n_aux_epochs=1)
    assert model.learn(16)._n_phases == 2


def test_own_networks_cannot_be_detached_from_outside() -> None:
    with pytest.raises(ValueError, match=r"critic_arch='detach' .*PolicyWithOwnNetwork.*forward_critic"):
        build(PolicyWithOwnNetwork, VECTOR, critic_arch="detach")
    with pytest.raises(ValueError, match="critic_arch='detach'"):
        PPG(PolicyWithOwnNetwork, SpaceEnv(), policy_kwargs={"critic_arch": "detach"})


def test_what_detaching_costs_is_only_the_gradient() -> None:
    shared, detached = (build(PPGPolicy, VECTOR, trunk_arch=[6], critic_arch=arch) for arch in ("shared", "detach"))
    assert isinstance(detached.mlp_extractor, MlpExtractor)
    assert_same(outputs(shared, VECTOR), outputs(detached, VECTOR))


def test_ppo_ewma_takes_ppgs_policies():
    policy_kwargs = {"net_arch": [8], "trunk_arch": [8], "critic_arch": "detach", "std_activation": "softplus"}
    model = PPOEWMA(PPGPolicy, "Pendulum-v1", n_steps=16, batch_size=8, n_epochs=1, policy_kwargs=policy_kwargs, seed=0)
    before = model.policy.aux_value_net.weight.detach().clone()
    model.learn(16)
    assert th.equal(model.policy.aux_value_net.weight, before)
    assert model.logger.name_to_value["train/std"] == pytest.approx(1, abs=0.05)
