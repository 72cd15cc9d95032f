"""
State-dependent exploration (gSDE).
"""

import itertools
from typing import Any

import numpy as np
import pytest
import torch as th

from tests.battery.algorithms import Algorithm
from tests.battery.envs import OBSERVATION_SPACES, SpaceEnv, box_env
from tests.battery.helpers import assert_trained, copy_parameters

OPTIONS = [
    {"full_std": full_std, "squash_output": squash_output, "use_expln": use_expln}
    for full_std, squash_output, use_expln in itertools.product((True, False), repeat=3)
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(name for name, on in o.items() if on) or "none")
def test_trains_with_every_option(algo: Algorithm, options: dict[str, Any]) -> None:
    # Without the analytic entropy of the squashed Gaussian, PPO estimates it from the samples.
    model = algo.make(box_env(), use_sde=True, sde_sample_freq=4, ent_coef=0.01, policy_kwargs=options)
    before = copy_parameters(model)
    model.learn(32)
    assert_trained(model, before)
    model.policy.reset_noise()


@pytest.mark.parametrize(("freq", "n_noises"), [(-1, 1), (4, 4), (1, 16)])
def test_noise_is_resampled_as_often_as_asked(algo: Algorithm, freq: int, n_noises: int) -> None:
    model = algo.make(box_env(), use_sde=True, sde_sample_freq=freq)
    noises = []
    predict = model.policy.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        noises.append(model.policy.action_dist.exploration_mat.sum().item())
        return predict(*args, **kwargs)

    model.policy.forward = forward  # type: ignore[method-assign]  # spies on the rollout
    model.learn(16)
    assert len(noises) == 16
    assert len(set(noises)) == n_noises


def test_squashed_actions_are_stored_in_minus_one_to_one(algo: Algorithm) -> None:
    env = SpaceEnv(action_space="box")
    model = algo.make(env, use_sde=True, policy_kwargs={"squash_output": True, "log_std_init": 1.0})
    model.learn(32)
    assert np.abs(model.rollout_buffer.actions).max() <= 1
    assert 1 < np.abs(env.actions).max() <= 2  # the environment's range is [-2, 2]


def test_image_and_matrix(algo: Algorithm) -> None:
    for observation in ("image_channels_first", "dict"):
        model = algo.make(SpaceEnv(OBSERVATION_SPACES[observation], "box_matrix"), use_sde=True, sde_sample_freq=2)
        before = copy_parameters(model)
        model.learn(32)
        assert_trained(model, before)


def test_std_is_logged(algo: Algorithm) -> None:
    model = algo.make(box_env(), use_sde=True, learning_rate=0.0, policy_kwargs={"log_std_init": -1.0}).learn(16)
    assert model.logger.name_to_value["train/std"] == pytest.approx(float(th.exp(th.tensor(-1.0))))
