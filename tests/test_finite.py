"""What is said of the parameters after a NaN or Inf, and whether it is true."""

import math
from typing import Any

import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback

from sb3_ppo_ewma import PPG, PPOEWMA
from tests.battery.envs import SpaceEnv

SMALL: dict[str, Any] = {"n_steps": 8, "batch_size": 8, "n_epochs": 1, "device": "cpu", "seed": 0}
PHASE: dict[str, Any] = {"n_policy_iterations": 1, "n_aux_epochs": 1, "aux_batch_size": 8}


def make(cls: Any = PPOEWMA, **kwargs: Any) -> Any:
    phase = PHASE if cls is PPG else {}
    return cls("MlpPolicy", SpaceEnv(), policy_kwargs={"net_arch": [4]}, **{**SMALL, **phase, **kwargs})


class AtRolloutEnd(BaseCallback):
    """Does something to the model at the end of the first rollout."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        self.change = change

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.change(self.model)


def huge_learning_rate(model: Any) -> None:
    model.lr_schedule = lambda _: 1e30
    for state in model.policy.optimizer.state.values():
        state["exp_avg"].fill_(1e20)


def broken_moments(model: Any) -> None:
    for state in model.policy.optimizer.state.values():
        state["exp_avg"].fill_(math.nan)


def broken_weight(model: Any) -> None:
    with th.no_grad():
        model.policy.action_net.weight[0, 0] = math.inf


@pytest.mark.parametrize("kwargs", [{}, {"engine": "reference"}, {"prox_decay": None}, {"n_epochs_value": 2}], ids=str)
@pytest.mark.parametrize("cls", [PPOEWMA, PPG])
@pytest.mark.parametrize("batch_size", [4, 16])  # of 16: the first step is the last
@pytest.mark.parametrize("change", [huge_learning_rate, broken_moments, broken_weight])
def test_parameters_are_only_said_to_be_finite_where_they_are(
    change: Any, batch_size: int, cls: Any, kwargs: dict[str, Any]
) -> None:
    model = make(cls, n_steps=16, batch_size=batch_size, **kwargs).learn(16)
    with pytest.raises(ValueError, match="NaN or Inf in") as raised:
        model.learn(16, AtRolloutEnd(change))
    is_finite = all(bool(th.isfinite(parameter).all()) for parameter in model.policy.parameters())
    assert ("the parameters are finite" in str(raised.value)) == is_finite
    assert is_finite or "load parameters that were saved earlier" in str(raised.value)
    if not is_finite:
        model.num_timesteps = 0
        with pytest.raises(ValueError, match=r"NaN or Inf in .*parameter '.*', the model cannot learn with it"):
            model.learn(16)
        assert model.num_timesteps == 0


def infinite_moments(model: Any) -> None:
    for state in model.policy.optimizer.state.values():
        state["exp_avg_sq"].fill_(math.inf)


def test_moments_with_which_nothing_would_move_are_said() -> None:
    model = make().learn(8)
    with pytest.raises(ValueError, match=r"NaN or Inf in exp_avg_sq of optimizer for the policy's parameter 'mlp"):
        model.learn(8, AtRolloutEnd(infinite_moments))
    assert all(bool(th.isfinite(parameter).all()) for parameter in model.policy.parameters())
    with pytest.raises(ValueError, match=r"NaN or Inf in exp_avg_sq of optimizer .*, the model cannot learn with it"):
        model.learn(8)


def test_huge_moments_are_no_infinite_ones() -> None:
    model = make().learn(8)
    for state in model.policy.optimizer.state.values():
        state["exp_avg_sq"].fill_(3e38)  # the sum of all of them is not finite
    assert model.learn(8).num_timesteps == 8
