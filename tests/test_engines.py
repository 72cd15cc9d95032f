"""
Every engine gives the numbers of the reference engine: whole trainings of generated cases, compared in parameters,
averages, optimisers, logs and random numbers. Most compute in double precision, in which nothing but rounding is below
the tolerance.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from torch import nn

from sb3_ppo_ewma import PPGEWMA, PPOEWMA
from sb3_ppo_ewma.rollouts import DeviceMinibatches
from tests.battery.envs import SpaceEnv
from tests.battery.helpers import assert_same, copy_parameters
from tests.engines import ENGINES, IMAGE, Case, Result, generate, needs_compiler, train

N_CASES, N_COMPILED = 520, 24
# The last four have nn.ReLU or a softplus standard deviation in the dense engine.
SAMPLE = (*range(66), 210, 112, 271)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def marked(numbers: range, sample: Sequence[int]) -> list[Any]:
    """:return: parameters of a test, of which only the sample is run without the slow tests"""
    return [pytest.param(n, marks=() if n in sample else pytest.mark.slow, id=str(generate(n))) for n in numbers]


def assert_close(own: th.Tensor, reference: th.Tensor, name: str, rtol: float, atol: float) -> None:
    """The tolerance is relative to the largest entry: sums round by their largest terms."""
    assert own.dtype == reference.dtype, name
    scale = float(reference.abs().max()) if reference.numel() else 0.0
    th.testing.assert_close(own, reference, rtol=0, atol=rtol * scale + atol, msg=lambda text: f"{name}: {text}")


def assert_close_states(own: dict[str, Any], reference: dict[str, Any], rtol: float, atol: float) -> None:
    """Of an optimiser."""
    assert own["param_groups"] == reference["param_groups"]
    assert own["state"].keys() == reference["state"].keys()
    for index, state in reference["state"].items():
        assert own["state"][index].keys() == state.keys()
        for name, value in state.items():
            if name == "step":  # fused Adam counts in single precision
                assert float(own["state"][index][name]) == float(value)
            elif isinstance(value, th.Tensor):
                assert_close(own["state"][index][name], value, f"{name} of parameter {index}", rtol, atol)
            else:
                assert own["state"][index][name] == value


def assert_equal_training(own: Result, reference: Result, case: Case) -> None:
    """
    Up to rounding. In single precision, Adam may turn the rounding of a gradient that is 0 otherwise into some share of
    a step, which is as large as the learning rate.
    """
    rtol, atol = (1e-8, 1e-9) if case.is_double else (1e-3, 0.02 * case.learning_rate)
    is_compiled = own.engine.startswith("compiled")  # graphs have no gradients
    names = [name for name in reference.tensors if not (is_compiled and name.startswith("gradient"))]
    assert set(own.tensors) == set(names)
    for name in names:
        assert_close(own.tensors[name], reference.tensors[name], name, rtol, atol)
    for name, state in reference.states.items():
        assert_close_states(own.states[name], state, rtol, 1e-12 if case.is_double else 1e-6)
    assert [row.keys() for row in own.rows] == [row.keys() for row in reference.rows]
    for own_row, row in zip(own.rows, reference.rows, strict=True):
        assert own_row == pytest.approx(row, rel=1e-7 if case.is_double else 2e-3, abs=1e-9 if case.is_double else 1e-4)
    assert len(reference.rows) >= 3
    for own_state, state in zip(own.random_state, reference.random_state, strict=True):
        assert str(own_state) == str(state)


def assert_explained(result: Result) -> None:
    """There is a reason against each faster engine."""
    first, *lines = result.explanation.splitlines()
    assert first.startswith(f"engine {result.engine!r}: ")
    assert [line.split(":")[0] for line in lines] == [f"- not {name!r}" for name in ENGINES[: len(lines)]]
    assert ENGINES[len(lines)] == result.engine
    assert all(len(line.partition(": ")[2]) > 5 for line in lines)


@pytest.mark.parametrize("number", marked(range(N_CASES), SAMPLE))
def test_same_training(number: int) -> None:
    case = generate(number)
    own, reference = train(case, "auto"), train(case, "reference")
    assert reference.engine == "reference"
    assert_explained(own)
    assert_equal_training(own, reference, case)


def is_compilable(case: Case) -> bool:
    """:return: whether its last training is one of compiled graphs"""
    return not case.change.policy and not case.customization and case.engine(torch_compile=True).startswith("compiled")


@pytest.fixture(scope="module")
def compilable() -> list[int]:
    """Numbers of cases that are trained by compiled graphs."""
    images = ("image", "small_image", "dict")  # whose graphs take minutes to compile
    numbers = (n for n in range(N_CASES) if generate(n).observations not in images and is_compilable(generate(n)))
    return [next(numbers) for _ in range(N_COMPILED)]


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("index", range(N_COMPILED))
def test_same_training_by_graphs(index: int, compilable: list[int]) -> None:
    case = generate(compilable[index])
    own, reference = train(case, "auto", torch_compile=True), train(case, "reference")
    assert own.engine.startswith("compiled")
    assert_explained(own)
    assert_equal_training(own, reference, case)


# ---------------------------------------------------------------------- which cases


def counted(numbers: Iterable[int]) -> Counter[str]:
    """:return: number of cases by the engine of their first training"""
    return Counter(generate(n).engine() for n in numbers)


def test_the_sample_covers_every_engine() -> None:
    counts = counted(SAMPLE)
    assert all(counts[engine] >= 4 for engine in ENGINES[2:]), counts


@pytest.mark.slow
def test_the_cases_cover_every_engine(compilable: list[int]) -> None:
    counts = counted(range(N_CASES))
    assert all(counts[engine] >= 40 for engine in ENGINES[2:]), counts
    compiled = Counter(generate(n).engine(torch_compile=True) for n in compilable)
    assert all(compiled[engine] >= 5 for engine in ENGINES[:2]), compiled


@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_what_a_policy_has_beside_its_networks_is_averaged_too(engine: str) -> None:
    kwargs = {"n_steps": 16, "batch_size": 4, "n_epochs": 1, "n_policy_iterations": 5, "prox_decay": 0.5, "seed": 0}
    model = PPGEWMA("MlpPolicy", SpaceEnv(), **kwargs, engine=engine, device="cpu")
    assert model.current_engine == ("dense" if engine == "auto" else "reference")
    index = model.policy_ewma.names.index("aux_value_net.bias")
    model.policy_ewma.averages[index].fill_(3.0)
    model.learn(16)
    # Only the phase trains it: it is 0, and 3 has the weight ½⁴ of 1 + ½ + ¼ + ⅛ + ½⁴ after 4 steps
    assert model.policy.aux_value_net.bias.item() == 0
    assert model.policy_ewma.averages[index].item() == pytest.approx(3 / 31)


# ---------------------------------------------------------------------- minibatches in parts


PARTS: dict[str, Case] = {
    "frozen": Case(0, PPOEWMA, "CnnPolicy", "image", "box", customization="one layer frozen"),
    "dictionary": Case(1, PPOEWMA, "MultiInputPolicy", "dict", "multidiscrete"),
    "critic frozen": Case(2, PPOEWMA, "MultiInputPolicy", "dict", "box", customization="critic frozen"),
    "phases": Case(3, PPGEWMA, "CnnPolicy", "image", "multibinary"),
}


@pytest.mark.parametrize("name", PARTS)
def test_ragged_minibatches_in_parts(name: str) -> None:
    case = PARTS[name]
    case.arguments = {"n_steps": 16, "batch_size": 7, "n_epochs": 2, "learning_rate": 1e-3, "ent_coef": 0.1}
    case.policy_arguments = {"net_arch": [8]}
    if case.cls is PPGEWMA:
        case.arguments |= {"n_policy_iterations": 2, "n_aux_epochs": 2, "aux_batch_size": 14}
        case.policy_arguments["optimizer_kwargs"] = {"eps": 0.02}
    own, reference = train(case, "auto"), train(case, "reference")
    assert own.engine == "microbatches"
    assert_equal_training(own, reference, case)


@pytest.mark.long
def test_size_of_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    conv2d = nn.functional.conv2d
    monkeypatch.setattr(nn.functional, "conv2d", lambda obs, *args: sizes.append(len(obs)) or conv2d(obs, *args))
    kwargs = {"n_steps": 400, "batch_size": None, "n_epochs": 1, "seed": 0, "prox_decay": None, "device": "cpu"}
    env = SpaceEnv(gym.spaces.Box(0, 255, (4, 84, 84), np.uint8))
    PPOEWMA("CnnPolicy", env, **{**kwargs, "batch_size": 400}).learn(400)
    # Nature CNN: 32 filters of 8x8 with stride 4 leave 20x20 values each, of 4 bytes. 8 MiB of them are 163 samples:
    # three parts, of about one size.
    assert Counter(size for size in sizes if size > 1) == {134: 2 * 3, 132: 3}


# ---------------------------------------------------------------------- steps that are not made


class Spike(gym.Wrapper[Any, Any, Any, Any]):
    """The reward of one step is so large that the square of its error overflows."""

    n_calls = 0

    def step(self, action: Any) -> Any:
        self.n_calls += 1
        observation, reward, *rest = self.env.step(action)
        return observation, 1e25 if self.n_calls == 6 else reward, *rest


MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "standard": {"policy_kwargs": {"net_arch": [8], "activation_fn": nn.ELU}},
    "microbatches": {"policy": "CnnPolicy", "observations": IMAGE},
    "fused": {"use_sde": True},
    "reference": {},
    "compiled dense": {"torch_compile": True},
    "compiled": {"torch_compile": True, "policy_kwargs": {"net_arch": [8], "activation_fn": nn.ELU}},
}
EVERY_ENGINE = pytest.mark.parametrize(
    "engine",
    [
        pytest.param(name, marks=(pytest.mark.slow, needs_compiler) if name.startswith("compiled") else ())
        for name in MODELS
    ],
)


def spiked(name: str, **kwargs: Any) -> Any:
    """:return: a model after a training that ended with a step that could not be made, for the spike"""
    kwargs = {**MODELS[name], **kwargs, "engine": "reference" if name == "reference" else "auto"}
    policy, observations = kwargs.pop("policy", "MlpPolicy"), kwargs.pop("observations", None)
    env = SpaceEnv(action_space="box") if observations is None else SpaceEnv(observations, "box")
    # Of a single sample, since nothing is carried over to others
    defaults = {"n_steps": 36, "batch_size": 8, "gamma": 0.0, "learning_rate": 1e-3, "seed": 0, "device": "cpu"}
    model = PPOEWMA(policy, Spike(env), **{**defaults, "policy_kwargs": {"net_arch": [8]}, **kwargs})
    assert model.current_engine == name
    with pytest.raises(ValueError, match=r"NaN or Inf in values after .* the update was not made"):
        model.learn(36)
    return model


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@EVERY_ENGINE
def test_no_step_is_made_after_one_that_cannot_be(engine: str) -> None:
    model = spiked(engine)
    own = {name: value for name, value in MODELS[engine].items() if name != "torch_compile"}
    reference = spiked("reference", **own)
    steps = [{float(state["step"]) for state in each.policy.optimizer.state.values()} for each in (model, reference)]
    assert steps == [{2.0}, {2.0}]  # the third of five minibatches has the spike
    th.testing.assert_close(copy_parameters(model), copy_parameters(reference), rtol=1e-4, atol=1e-5)
    assert model.policy_ewma.total_weight == pytest.approx(reference.policy_ewma.total_weight)
    assert model.policy_ewma.total_weight > 1


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@EVERY_ENGINE
def test_a_step_that_is_not_made_changes_nothing(engine: str) -> None:
    def break_values(model: Any) -> None:
        with th.no_grad():
            model.policy.value_net.bias.fill_(1e30)  # its square overflows

    model = spiked(engine, prox_decay=None)
    break_values(model)
    before = copy_parameters(model)
    states = {key: dict(value) for key, value in model.policy.optimizer.state_dict()["state"].items()}
    states = {key: {name: tensor.clone() for name, tensor in value.items()} for key, value in states.items()}
    with pytest.raises(ValueError, match=r"NaN or Inf in values .* the update was not made"):
        model.learn(36, reset_num_timesteps=False)
    assert_same(copy_parameters(model), before)
    assert_same(dict(model.policy.optimizer.state_dict()["state"]), states)


@EVERY_ENGINE
def test_a_broken_average_is_found(engine: str) -> None:
    model = spiked(engine)  # has an average of three policies

    def break_average(*_: Any) -> bool:
        model.policy_ewma.averages[-3].fill_(float("nan"))  # of the actor's head
        return True

    before = copy_parameters(model)
    # Distributions of torch refuse their parameters before there is a loss.
    average = "the moving average of the policy's parameter"
    message = rf"NaN or Inf in (policy loss .* the update was not made, but {average} .* has NaN or Inf|{average})"
    with pytest.raises(ValueError, match=message):
        model.learn(36, break_average, reset_num_timesteps=False)
    assert_same(copy_parameters(model), before)


@pytest.mark.parametrize("engine", ["dense", pytest.param("compiled dense", marks=[pytest.mark.slow, needs_compiler])])
def test_an_interrupted_training_keeps_its_steps(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def blocks(*args: Any) -> Any:
        epochs.append(1)
        if len(epochs) == 3:
            raise KeyboardInterrupt
        return own_blocks(*args)

    epochs: list[int] = []
    own_blocks = DeviceMinibatches.blocks
    kwargs = {"n_steps": 32, "batch_size": 8, "n_epochs": 2, "seed": 0, "device": "cpu", "learning_rate": 0.01}
    kwargs |= MODELS[engine]
    expected = PPOEWMA("MlpPolicy", SpaceEnv(action_space="box"), **kwargs).learn(32)
    monkeypatch.setattr(DeviceMinibatches, "blocks", blocks)
    model = PPOEWMA("MlpPolicy", SpaceEnv(action_space="box"), **{**kwargs, "n_epochs": 4, "prox_decay": "auto"})
    assert model.current_prox_decay == expected.current_prox_decay
    with pytest.raises(KeyboardInterrupt):
        model.learn(32)
    assert_same(copy_parameters(model), copy_parameters(expected))
    assert_same(dict(model.policy_ewma.state_dict()), dict(expected.policy_ewma.state_dict()))
    assert_same(dict(model.policy.optimizer.state_dict()), dict(expected.policy.optimizer.state_dict()))


# ---------------------------------------------------------------------- moments that have decayed


class RareInput(gym.ObservationWrapper[Any, Any, Any]):
    """The last observed number is 1 in the first rollout and 0 from then on: its weights get no gradients any more."""

    count = 0

    def observation(self, observation: Any) -> Any:
        self.count += 1
        return np.append(observation[:-1], np.float32(self.count < 64))


def train_on_rare_input(eps: float, betas: tuple[float, float] = (0.5, 0.6), **kwargs: Any) -> PPOEWMA:
    """:return: a model after 200 gradient steps"""
    policy_kwargs = {
        "net_arch": [8],
        **kwargs.pop("policy_kwargs", {}),
        "optimizer_kwargs": {"eps": eps, "betas": betas},
    }
    defaults = {"n_steps": 64, "batch_size": 16, "n_epochs": 10, "seed": 0, "device": "cpu"}
    model = PPOEWMA("MlpPolicy", RareInput(SpaceEnv()), **{**defaults, **kwargs}, policy_kwargs=policy_kwargs)
    return model.learn(5 * 64)


def n_denormal(model: PPOEWMA) -> int:
    """:return: number of moments that are denormal"""
    moments = [each for state in model.policy.optimizer.state.values() for each in state.values()]
    return sum(int(((each != 0) & (each.abs() < th.finfo(each.dtype).tiny)).sum()) for each in moments)


@pytest.mark.parametrize(
    "engine", ["dense", "standard", pytest.param("compiled dense", marks=[pytest.mark.slow, needs_compiler])]
)
def test_decayed_moments_are_cleared_and_change_nothing(engine: str) -> None:
    model = train_on_rare_input(1e-5, **MODELS[engine])
    assert model.current_engine == engine
    assert n_denormal(model) == 0
    own = {name: value for name, value in MODELS[engine].items() if name == "policy_kwargs"}
    reference = train_on_rare_input(1e-5, **own, engine="reference")
    assert n_denormal(reference) >= 8
    th.testing.assert_close(copy_parameters(model), copy_parameters(reference), rtol=1e-3, atol=1e-4)


def test_moments_count_beside_a_tiny_epsilon() -> None:
    assert n_denormal(train_on_rare_input(1e-12)) >= 8
