"""Clipped steps with Adam's fused kernel: those of torch's own methods up to rounding."""

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import PPO
from torch import nn

from sb3_ppo_ewma import PPOEWMA
from sb3_ppo_ewma._engine.optimizers import ClippedSteps, can_be_fused
from tests.battery.envs import SpaceEnv
from tests.battery.helpers import assert_same, copy_parameters

MAX_GRAD_NORM = 0.5
ZERO = th.zeros(())
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "SB3": {"eps": 1e-5, "lr": 3e-4},
    "betas": {"betas": (0.5, 0.8), "lr": 0.1},
    "weight_decay": {"weight_decay": 0.1, "eps": 0.1},
    "fused": {"fused": True},
}


def make_parameters() -> list[nn.Parameter]:
    """:return: four, the same each time"""
    th.manual_seed(0)
    return [nn.Parameter(th.randn(shape)) for shape in ((3, 4), (5,), (), (2, 2, 2))]


def set_gradients(parameters: list[nn.Parameter], seed: int, scale: float = 1.0, without: int | None = None) -> None:
    """Some norms are above the limit, some below."""
    generator = th.Generator().manual_seed(seed)
    for index, parameter in enumerate(parameters):
        gradient = th.randn(parameter.shape, generator=generator) * scale * 3.0 ** (seed % 5 - 4)
        parameter.grad = None if index == without else gradient


def torch_step(optimizer: th.optim.Optimizer, parameters: list[nn.Parameter]) -> th.Tensor:
    """:return: norm of the gradients"""
    norm = nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
    optimizer.step()
    return norm


def assert_close(own: Any, reference: Any) -> None:
    """Up to rounding."""
    th.testing.assert_close(own, reference, rtol=1e-5, atol=1e-6)


def assert_same_layout(own: dict[str, Any], reference: dict[str, Any]) -> None:
    """The state dictionaries differ by rounding only."""
    assert own["param_groups"] == reference["param_groups"]
    assert own["state"].keys() == reference["state"].keys()
    for index, state in reference["state"].items():
        assert list(own["state"][index]) == list(state)
        assert_close(own["state"][index], state)  # shapes and dtypes, too


# ---------------------------------------------------------------------- steps


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_steps_as_torch(settings: dict[str, Any], fused: bool) -> None:
    parameters, reference = make_parameters(), make_parameters()
    optimizer, torchs = th.optim.Adam(parameters, **settings), th.optim.Adam(reference, **settings)
    steps = ClippedSteps(optimizer, parameters, MAX_GRAD_NORM, fused)
    for seed in range(40):
        for group in (*optimizer.param_groups, *torchs.param_groups):
            group["lr"] = 0.01 / (seed + 1)
        set_gradients(parameters, seed)
        set_gradients(reference, seed)
        checked = steps.step(th.tensor(2.0))
        assert_close(checked, torch_step(torchs, reference) + 2)
    assert_close(parameters, reference)
    assert_same_layout(optimizer.state_dict(), torchs.state_dict())


def test_without_the_kernel_to_the_bit() -> None:
    parameters, reference = make_parameters(), make_parameters()
    optimizer, torchs = th.optim.RMSprop(parameters, momentum=0.5), th.optim.RMSprop(reference, momentum=0.5)
    steps = ClippedSteps(optimizer, parameters, MAX_GRAD_NORM, fused=False)
    for seed in range(10):
        set_gradients(parameters, seed)
        set_gradients(reference, seed)
        steps.step(ZERO)
        torch_step(torchs, reference)
    assert_same(parameters, reference)


def test_groups_with_settings_of_their_own() -> None:
    parameters, reference = make_parameters(), make_parameters()
    optimizer, torchs = (
        th.optim.Adam(
            [
                {"params": tensors[:2], "lr": 0.01, "weight_decay": 0.1},
                {"params": tensors[2:], "lr": 0.1, "betas": (0.5, 0.6), "eps": 0.01},
            ]
        )
        for tensors in (parameters, reference)
    )
    steps = ClippedSteps(optimizer, parameters, MAX_GRAD_NORM, fused=True)
    for seed in range(10):
        set_gradients(parameters, seed)
        set_gradients(reference, seed)
        steps.step(ZERO)
        torch_step(torchs, reference)
    assert_close(parameters, reference)
    assert_same_layout(optimizer.state_dict(), torchs.state_dict())


@pytest.mark.parametrize("fused", [True, False])
def test_parameters_without_gradient_stay(fused: bool) -> None:
    parameters, reference = make_parameters(), make_parameters()
    optimizer, torchs = th.optim.Adam(parameters, weight_decay=0.1), th.optim.Adam(reference, weight_decay=0.1)
    steps = ClippedSteps(optimizer, parameters, MAX_GRAD_NORM, fused)
    for seed, without in enumerate([0, 0, None, 2, 2, 3, None]):
        set_gradients(parameters, seed, without=without)
        set_gradients(reference, seed, without=without)
        steps.step(ZERO)
        torch_step(torchs, reference)
    assert_close(parameters, reference)
    assert_same_layout(optimizer.state_dict(), torchs.state_dict())
    assert [state["step"].item() for state in optimizer.state_dict()["state"].values()] == [
        {0: 5, 1: 7, 2: 5, 3: 6}[index] for index in optimizer.state_dict()["state"]
    ]


def test_fused_and_ordinary_steps_take_turns() -> None:
    parameters, reference = make_parameters(), make_parameters()
    optimizer, torchs = th.optim.Adam(parameters, lr=0.01), th.optim.Adam(reference, lr=0.01)
    fused = ClippedSteps(optimizer, parameters, MAX_GRAD_NORM, fused=True)
    for seed in range(12):
        set_gradients(parameters, seed)
        set_gradients(reference, seed)
        if seed % 3 == 1:
            torch_step(optimizer, parameters)
        else:
            fused.step(ZERO)
        torch_step(torchs, reference)
    assert_close(parameters, reference)
    assert_same_layout(optimizer.state_dict(), torchs.state_dict())


def test_steps_go_on_from_a_loaded_state() -> None:
    parameters, reference = make_parameters(), make_parameters()
    optimizer, torchs = th.optim.Adam(parameters, lr=0.01), th.optim.Adam(reference, lr=0.01)
    for seed in range(12):
        set_gradients(parameters, seed)
        set_gradients(reference, seed)
        ClippedSteps(optimizer, parameters, MAX_GRAD_NORM, fused=True).step(ZERO)
        torch_step(torchs, reference)
        if seed == 5:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = th.optim.Adam(parameters)
            optimizer.load_state_dict(state)
    assert_close(parameters, reference)
    assert_same_layout(optimizer.state_dict(), torchs.state_dict())


@pytest.mark.parametrize("fused", [True, False])
def test_a_largest_norm_of_zero(fused: bool) -> None:
    parameters = make_parameters()
    before = copy.deepcopy(parameters)
    steps = ClippedSteps(th.optim.Adam(parameters), parameters, 0.0, fused)
    set_gradients(parameters, 0)
    assert steps.step(ZERO) > 0
    assert_same(list(parameters), before)


# ---------------------------------------------------------------------- steps that are not made


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_nothing_changes_where_something_is_not_finite(where: str, value: float, fused: bool) -> None:
    parameters = make_parameters()
    optimizer = th.optim.Adam(parameters, lr=0.01, weight_decay=0.1)
    steps = ClippedSteps(optimizer, parameters, MAX_GRAD_NORM, fused)
    for seed in range(3):
        set_gradients(parameters, seed)
        assert bool(th.isfinite(steps.step(ZERO)))
    before = copy.deepcopy((list(parameters), optimizer.state_dict()))
    set_gradients(parameters, 3)
    if where == "gradient":
        parameters[1].grad[2] = value
    checked = steps.step(th.tensor(value if where == "loss" else 0.0))
    assert not bool(th.isfinite(checked))
    assert_same((list(parameters), optimizer.state_dict()), before)
    # It goes on as if nothing had been.
    set_gradients(parameters, 4)
    assert bool(th.isfinite(steps.step(ZERO)))
    assert all(state["step"] == 4 for state in optimizer.state.values())


# ---------------------------------------------------------------------- which optimisers


class OwnAdam(th.optim.Adam):
    """May compute something else."""


def with_hook(parameters: list[nn.Parameter], register: str) -> th.optim.Optimizer:
    optimizer = th.optim.Adam(parameters)
    getattr(optimizer, register)(lambda *_: None)
    return optimizer


OTHERS: dict[str, Callable[[list[nn.Parameter]], th.optim.Optimizer]] = {
    "subclass": OwnAdam,
    "AdamW": th.optim.AdamW,
    "SGD": th.optim.SGD,
    "hook before": lambda parameters: with_hook(parameters, "register_step_pre_hook"),
    "hook after": lambda parameters: with_hook(parameters, "register_step_post_hook"),
    "amsgrad": lambda parameters: th.optim.Adam(parameters, amsgrad=True),
    "maximize": lambda parameters: th.optim.Adam(parameters, maximize=True),
    "differentiable": lambda parameters: th.optim.Adam(parameters, differentiable=True),
    "tensor": lambda parameters: th.optim.Adam(parameters, lr=th.tensor(0.01)),
    "one group": lambda parameters: th.optim.Adam(
        [{"params": parameters[:1]}, {"params": parameters[1:], "amsgrad": True}]
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_which_optimizers_step_in_their_own_way(name: str) -> None:
    assert can_be_fused(th.optim.Adam(make_parameters(), weight_decay=0.1))
    assert not can_be_fused(OTHERS[name](make_parameters()))


# ---------------------------------------------------------------------- in the algorithm


def env() -> SpaceEnv:
    """:return: with continuous actions"""
    return SpaceEnv(action_space="box", episode_length=5)


def make(cls: Any = PPOEWMA, **kwargs: Any) -> Any:
    """:return: a small model: 2 epochs of 2 minibatches in an iteration"""
    defaults: dict[str, Any] = {"n_steps": 16, "batch_size": 8, "n_epochs": 2, "seed": 0, "learning_rate": 0.01}
    return cls("MlpPolicy", env(), **{**defaults, **kwargs})


@pytest.mark.parametrize(
    ("policy_kwargs", "n_calls"),
    [
        ({}, 0),
        ({"optimizer_kwargs": {"eps": 1e-5}}, 8),
        ({"optimizer_class": th.optim.Adam}, 8),
        ({"optimizer_kwargs": {"fused": True}}, 0),
        ({"optimizer_kwargs": {"fused": True, "amsgrad": True}}, 8),
    ],
    ids=str,
)
def test_given_settings_are_stepped_by_the_optimizer(
    policy_kwargs: dict[str, Any], n_calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    step = th.optim.Adam.step

    def counted(self: th.optim.Adam, closure: Any = None) -> Any:
        calls.append(self)
        return step(self, closure)

    monkeypatch.setattr(th.optim.Adam, "step", counted)
    make(policy_kwargs=policy_kwargs).learn(32)
    assert len(calls) == n_calls


def test_hooks_of_the_optimizer_are_called() -> None:
    model, calls = make(), []
    model.policy.optimizer.register_step_post_hook(lambda *_: calls.append(1))
    model.learn(32)
    assert len(calls) == 8


def test_state_is_that_of_sb3() -> None:
    own, reference = (make(cls).learn(32).policy.optimizer.state_dict() for cls in (PPOEWMA, PPO))
    assert own["param_groups"] == reference["param_groups"]
    assert own["state"].keys() == reference["state"].keys()
    for index, state in reference["state"].items():
        assert list(own["state"][index]) == list(state)
        assert own["state"][index]["step"] == state["step"] == 8
        assert all(own["state"][index][name].shape == state[name].shape for name in state)
        assert all(own["state"][index][name].dtype == state[name].dtype for name in state)


def test_without_ewma_close_to_ppo() -> None:
    own, reference = make(prox_decay=None).learn(32), make(PPO).learn(32)
    th.testing.assert_close(copy_parameters(own), copy_parameters(reference), rtol=1e-4, atol=1e-5)


def test_saved_models_and_ppo_go_on_alike() -> None:
    model = make(prox_decay=None).learn(32)
    file, ppo_file = io.BytesIO(), io.BytesIO()
    model.save(file)
    model.to_ppo().save(ppo_file)
    loaded = PPOEWMA.load(file, env=env()), PPO.load(ppo_file, env=env())
    for other in loaded:
        assert_same(dict(other.policy.state_dict()), dict(model.policy.state_dict()))
        assert_same(other.policy.optimizer.state_dict(), model.policy.optimizer.state_dict())
        other.set_random_seed(1)
        other.learn(32)
        assert all(state["step"] == 16 for state in other.policy.optimizer.state.values())
    th.testing.assert_close(*map(copy_parameters, loaded), rtol=1e-4, atol=1e-5)


def test_a_group_without_gradients() -> None:
    first, second = th.ones(2, requires_grad=True), th.ones(2, requires_grad=True)
    optimizer = th.optim.Adam([{"params": [first]}, {"params": [second]}], lr=0.1)
    steps = ClippedSteps(optimizer, [first, second], MAX_GRAD_NORM, fused=True)
    first.grad = th.ones(2)
    steps.step(ZERO)
    assert first[0] < 1 == second[0]
    assert second not in optimizer.state


# ---------------------------------------------------------------------- moments that have decayed


class RareInput(gym.ObservationWrapper[Any, Any, Any]):
    """The last observed number is 1 in the first rollout and 0 from then on: its weights get no gradients any more."""

    count = 0

    def observation(self, observation: Any) -> Any:
        self.count += 1
        return np.append(observation[:-1], np.float32(self.count < 64))


def train_on_rare_input(**policy_kwargs: Any) -> PPOEWMA:
    model = PPOEWMA(
        "MlpPolicy", RareInput(SpaceEnv()), n_steps=64, batch_size=16, device="cpu", seed=0, policy_kwargs=policy_kwargs
    )
    return model.learn(30 * 64)  # 1200 gradient steps


def denormal_moments(model: PPOEWMA) -> int:
    found = 0
    for state in model.policy.optimizer.state.values():
        for moments in (state["exp_avg"], state["exp_avg_sq"]):
            found += int(((moments != 0) & (moments.abs() < th.finfo(moments.dtype).tiny)).sum())
    return found


@pytest.mark.parametrize("policy_kwargs", [{}, {"activation_fn": nn.ELU}], ids=["one tensor", "several tensors"])
def test_decayed_moments_are_no_denormal_numbers_and_change_nothing(
    policy_kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = train_on_rare_input(**policy_kwargs)
    assert denormal_moments(model) == 0
    monkeypatch.setattr("sb3_ppo_ewma._engine.optimizers._FLUSH_EVERY", 10**9)
    other = train_on_rare_input(**policy_kwargs)
    assert denormal_moments(other) >= 64
    assert_same(copy_parameters(model), copy_parameters(other))


def test_moments_stay_where_settings_of_the_optimizer_are_given() -> None:
    assert denormal_moments(train_on_rare_input(optimizer_kwargs={"eps": 1e-5})) >= 64


@pytest.mark.parametrize(("eps", "flushed"), [(1e-5, True), (1e-12, False)])
def test_moments_count_beside_a_tiny_epsilon(eps: float, flushed: bool) -> None:
    parameter = nn.Parameter(th.zeros(2))
    optimizer = th.optim.Adam([parameter], eps=eps)
    steps = ClippedSteps(optimizer, [parameter], MAX_GRAD_NORM, fused=True)
    parameter.grad = th.tensor([1e-3, 1e-30])
    moments = []
    for _ in range(128):
        steps.step(ZERO)
        steps.flush_moments(1)
        moments.append(optimizer.state[parameter]["exp_avg"].clone())
    assert all(bool((each != 0).all()) for each in moments[:-1])
    assert moments[-1].ne(0).tolist() == [True, not flushed]
