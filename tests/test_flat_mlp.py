"""Training of MlpPolicy on long vectors: where it applies, and that the policy itself has the result."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.type_aliases import RolloutBufferSamples

from sb3_ppo_ewma import PPGEWMA, PPOEWMA, rollouts
from sb3_ppo_ewma._engine import forward
from sb3_ppo_ewma._engine.flat_mlp import FlatMlp, can_be_flat
from sb3_ppo_ewma._engine.gradient_steps import TrainStatistics
from sb3_ppo_ewma._engine.mlp import MlpPolicy
from sb3_ppo_ewma.rollouts import DeviceData
from tests.battery.envs import ACTION_SPACES, VECTOR, SpaceEnv
from tests.battery.helpers import copy_parameters


def make(cls: Any = PPOEWMA, **kwargs: Any) -> Any:
    """:return: a small model: 2 epochs of 2 minibatches in an iteration"""
    defaults: dict[str, Any] = {"n_steps": 16, "batch_size": 8, "n_epochs": 2, "learning_rate": 0.01, "seed": 0}
    return cls("MlpPolicy", SpaceEnv(), **{**defaults, "policy_kwargs": {"net_arch": [4]}, **kwargs})


# ---------------------------------------------------------------------- the policy has the result


def test_optimizer_and_policy_hold_the_result() -> None:
    model = make(learning_rate=0.0).learn(32)
    state = model.policy.optimizer.state_dict()["state"]
    assert {float(entry["step"]) for entry in state.values()} == {8}
    for parameter, entry in zip(model.policy.parameters(), state.values(), strict=True):
        assert entry["exp_avg"].shape == entry["exp_avg_sq"].shape == parameter.shape
        assert entry["exp_avg"].abs().sum() > 0
        assert parameter.grad.shape == parameter.shape
    # The parameters never changed, so neither did their average, of 1 + 8 steps
    th.testing.assert_close(
        dict(model.policy_ewma.module.named_parameters()), dict(model.policy.named_parameters()), rtol=1e-5, atol=1e-6
    )
    assert float(model.policy_ewma.total_weight) == pytest.approx(sum((2 / 3) ** k for k in range(9)))


def interrupted(model: Any, after: int) -> Any:
    """:return: the model after an iteration that was interrupted after some of its steps"""
    n_calls = 0

    def loss_terms(*args: Any) -> Any:
        nonlocal n_calls
        n_calls += 1
        if n_calls > after:
            raise KeyboardInterrupt
        return own(*args)

    own = FlatMlp.loss_terms
    with patch.object(FlatMlp, "loss_terms", loss_terms), pytest.raises(KeyboardInterrupt):
        model.learn(16)
    return model


def test_an_interrupted_training_keeps_its_steps() -> None:
    model = interrupted(make(), after=2)
    expected = make(n_epochs=1).learn(16)  # its first epoch
    th.testing.assert_close(copy_parameters(model), copy_parameters(expected), rtol=0, atol=0)
    assert model.policy_ewma.total_weight == expected.policy_ewma.total_weight
    states = [dict(each.policy.optimizer.state_dict()) for each in (model, expected)]
    assert {float(entry["step"]) for entry in states[0]["state"].values()} == {2}
    th.testing.assert_close(*[each["state"] for each in states], rtol=0, atol=0)


def test_nothing_but_a_first_step_makes_a_state() -> None:
    model = interrupted(make(), after=0)
    assert not model.policy.optimizer.state


def test_what_a_policy_has_beside_its_networks_is_averaged_too() -> None:
    model = make(PPGEWMA, n_policy_iterations=5, prox_decay=0.5)
    with th.no_grad():
        model.policy_ewma.module.aux_value_net.bias.fill_(3.0)
        model.policy_ewma.total_weight.fill_(2.0)  # or the first iteration starts from the policy
        model.policy.aux_value_net.bias.fill_(1.0)
    model.learn(16)
    # The phase does not train it: weights of 3 and 1 are 2·½⁴ and 1 + ½ + ¼ + ⅛ after 4 steps
    assert model.policy.aux_value_net.bias.item() == 1
    expected = (3 * 0.125 + 1.875) / 2
    assert model.policy_ewma.module.aux_value_net.bias.item() == pytest.approx(expected)


def test_a_broken_average_is_found() -> None:
    # Without the clip's branch, which is NaN, gradients are finite.
    model = make().learn(16)
    with th.no_grad():
        model.policy_ewma.module.action_net.bias.fill_(float("nan"))
    before = copy_parameters(model)
    with pytest.raises(ValueError, match=r"NaN or Inf in policy loss .* the update was not made"):
        model.learn(16, reset_num_timesteps=False)
    th.testing.assert_close(copy_parameters(model), before, rtol=0, atol=0, equal_nan=True)


def test_parameters_are_the_policys_between_epochs() -> None:
    class Watching(PPOEWMA):
        def _train_epoch(self, *args: Any) -> bool:
            made = super()._train_epoch(*args)
            seen.append(copy_parameters(self))
            return made

    seen: list[dict[str, th.Tensor]] = []
    one, two = make(Watching, n_epochs=1).learn(16), make(Watching).learn(16)
    th.testing.assert_close(seen[0], copy_parameters(one), rtol=0, atol=0)
    th.testing.assert_close(seen[1], seen[0], rtol=0, atol=0)
    th.testing.assert_close(seen[2], copy_parameters(two), rtol=0, atol=0)
    assert not th.equal(seen[1]["action_net.weight"], seen[2]["action_net.weight"])


# ---------------------------------------------------------------------- where it applies


def step(model: Any, parameter: Any) -> None:
    """Make a step of one parameter alone."""
    parameter.grad = th.ones_like(parameter)
    model.policy.optimizer.step()


def give_groups(model: Any) -> None:
    parameters = list(model.policy.parameters())
    model.policy.optimizer = th.optim.Adam([{"params": parameters[:2], "lr": 0.0}, {"params": parameters[2:]}])


def replace_optimizer(model: Any) -> None:
    model.policy.optimizer = th.optim.SGD(model.policy.parameters(), lr=0.1)


def leave_out(model: Any) -> None:
    model.policy.optimizer = th.optim.Adam(list(model.policy.parameters())[1:])


CHANGES: dict[str, Callable[[Any], Any]] = {
    "frozen": lambda model: model.policy.value_net.bias.requires_grad_(False),
    "another optimizer": replace_optimizer,
    "groups": give_groups,
    "not in the optimizer": leave_out,
    "numbers of steps": lambda model: step(model, model.policy.value_net.bias),
    "dtypes": lambda model: model.policy.value_net.double(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_policies_that_are_not_flat(change: str) -> None:
    model = make()
    assert can_be_flat(MlpPolicy(model.policy))
    CHANGES[change](model)
    assert not can_be_flat(MlpPolicy(model.policy))


@pytest.mark.parametrize("change", ["groups", "numbers of steps", "not in the optimizer"])
def test_others_are_trained_all_the_same(change: str) -> None:
    model = make(learning_rate=1e-3)
    CHANGES[change](model)
    before = copy_parameters(model)
    with patch.object(FlatMlp, "__init__", side_effect=AssertionError):
        model.learn(16)
    unchanged = [name for name, value in copy_parameters(model).items() if th.equal(value, before[name])]
    assert len(unchanged) == (change == "not in the optimizer")


@pytest.mark.parametrize(
    "name", ["_policy_loss_terms", "_log_prob_prox", "_normalized_advantages", "_evaluate_actions"]
)
def test_overridden_methods_are_called(name: str) -> None:
    def method(self: Any, *args: Any) -> Any:
        calls.append(name)
        return getattr(PPOEWMA, name)(self, *args)

    calls: list[str] = []
    make(type("Own", (PPOEWMA,), {name: method})).learn(16)
    assert len(calls) >= 4


# ---------------------------------------------------------------------- minibatches


def filled_buffer(n_steps: int) -> RolloutBuffer:
    """:return: whose returns are 0, 1, 2, ... in its flattened order"""
    buffer = RolloutBuffer(n_steps, VECTOR, ACTION_SPACES["discrete"], device="cpu")
    buffer.reset()
    buffer.returns[:] = np.arange(n_steps)[:, None]
    buffer.observations[:] = buffer.returns[..., None]
    buffer.full = True
    return buffer


@pytest.mark.parametrize("limit", [1, 30, 100, 10_000])
@pytest.mark.parametrize("batch_size", [4, 6, 22, 100, None])
def test_blocks_are_the_minibatches_of_an_epoch(batch_size: int | None, limit: int) -> None:
    data = DeviceData(filled_buffer(22), RolloutBufferSamples)
    np.random.seed(0)
    expected = [data.samples(indices).returns.tolist() for indices in data.minibatches(batch_size)]
    np.random.seed(0)
    with patch.object(rollouts, "_BLOCK", limit):
        blocks = list(data.blocks(batch_size, features_dim=3))
    found = [part.tolist() for samples, n in blocks for part in samples.returns.chunk(n)]
    assert found == expected
    for samples, n in blocks:
        assert n == 1 or samples.observations.numel() <= limit
        assert th.equal(samples.observations[:, 0], samples.returns)


# ---------------------------------------------------------------------- statistics


def test_rows_become_terms_by_the_number_of_rows() -> None:
    statistics = TrainStatistics()
    statistics.begin_epoch()
    for values in ([1.0, 3.0], [5.0, 7.0], [9.0]):
        statistics.add({"x": th.tensor(values), "kept": th.tensor(values)})
    statistics.condense(lambda rows: {"mean": rows["x"].mean(-1)}, ["x", "y"])
    assert statistics.terms("mean").tolist() == [2, 6, 9]
    assert "x" not in statistics._minibatches[0]
    assert statistics.reduce(lambda rows: rows.sum(-1), "kept").tolist() == [4, 12, 9]


@pytest.mark.parametrize("actions", ["discrete", "box"])
def test_terms_of_the_loss(actions: str) -> None:
    model = PPOEWMA("MlpPolicy", SpaceEnv(action_space=actions), n_steps=16, batch_size=8, ent_coef=0.5, kl_coef=2.0)
    flat = FlatMlp(MlpPolicy(model.policy), None)
    if actions == "discrete":
        distribution = th.tensor([[[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]]).log()
        entropy = np.log(2) / 2
    else:
        distribution = th.tensor([[1.0, 2.0]])
        entropy = np.log(2 * np.pi * np.e) + np.log(2)
    rows = {
        "objective": th.tensor([[1.0, 2.0]]),
        "penalty": th.tensor([[0.25, 0.75]]),
        "errors": th.tensor([[3.0, -1.0]]),
        "distribution": distribution,
    }
    terms = {name: float(value) for name, value in flat.statistics(rows, model._current_coefficients()).items()}
    assert terms == pytest.approx(
        {
            "policy_gradient_loss": -1.5,
            "kl_loss": 0.5,
            "entropy_loss": -entropy,
            "value_loss": 5,
            "loss": -1.5 + 0.5 + 0.5 * 5 - 0.5 * entropy,
        }
    )


def test_entropy_of_several_minibatches() -> None:
    model = make()
    log_probs = th.log_softmax(th.randn(4, 5, 3), dim=-1)
    together = forward.entropy(model.policy, [log_probs])
    th.testing.assert_close(together, th.stack([forward.entropy(model.policy, [each]) for each in log_probs]))
