"""
The algorithms learn.
"""

from typing import Any

import gymnasium as gym
import pytest
from stable_baselines3.common.envs import IdentityEnv, IdentityEnvBox, IdentityEnvMultiBinary, IdentityEnvMultiDiscrete
from stable_baselines3.common.evaluation import evaluate_policy

from tests.battery.algorithms import Algorithm

pytestmark = pytest.mark.long

ENVS: dict[str, gym.Env[Any, Any]] = {
    "discrete": IdentityEnv(2),
    "multidiscrete": IdentityEnvMultiDiscrete(2),
    "multibinary": IdentityEnvMultiBinary(2),
    "box": IdentityEnvBox(eps=0.5),
}


@pytest.mark.parametrize("space", ENVS)
def test_repeats_the_observation(algo: Algorithm, space: str) -> None:
    """One point for each step in which the action is the observation: chance gives a half, a quarter or a third."""
    kwargs = {"gamma": 0.4, "n_steps": 64, "batch_size": 64, "n_epochs": 10, "learning_rate": 3e-3}
    model = algo.make(ENVS[space], **kwargs, policy_kwargs={"net_arch": [32]})
    before, _ = evaluate_policy(model, ENVS[space], n_eval_episodes=5, warn=False, deterministic=False)
    model.learn(1500)
    after, _ = evaluate_policy(model, ENVS[space], n_eval_episodes=5, warn=False)
    assert before < 70
    assert after > 90
