"""
The same seed gives the same run.
"""

from typing import Any

import numpy as np
import pytest
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv

from tests.battery.algorithms import Algorithm
from tests.battery.envs import OBSERVATION_SPACES, SpaceEnv, copies
from tests.battery.helpers import assert_same, auxiliary_head, copy_parameters


def run(algo: Algorithm, env: Any, **kwargs: Any) -> tuple[dict[str, Any], list[Any]]:
    """
    :return: the parameters after training, and actions and rewards of the trained model
    """
    model = algo.make(env, **kwargs).learn(48)
    trained = copy_parameters(model)
    observations, trace = model.get_env().reset(), []
    for _ in range(10):
        actions, _ = model.predict(observations, deterministic=False)
        observations, rewards, _, _ = model.get_env().step(actions)
        trace.append((actions, rewards))
    return trained, trace


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "cartpole": (lambda: "CartPole-v1", {}),
    "pendulum": (lambda: "Pendulum-v1", {}),
    "sde": (lambda: SpaceEnv(action_space="box"), {"use_sde": True, "sde_sample_freq": 4}),
    "dict": (lambda: SpaceEnv(OBSERVATION_SPACES["dict"], "multidiscrete"), {}),
    "several": (lambda: DummyVecEnv(copies(SpaceEnv, 3)), {}),
}


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_same_seed_same_run(algo: Algorithm, case: str) -> None:
    make, kwargs = CASES[case]
    first, second = run(algo, make(), seed=7, **kwargs), run(algo, make(), seed=7, **kwargs)
    assert_same(first, second)
    other, _ = run(algo, make(), seed=8, **kwargs)
    assert not any(np.array_equal(value, other[name]) for name, value in first[0].items() if "weight" in name)


def test_seed_can_be_set_later(algo: Algorithm) -> None:
    runs = []
    for _ in range(2):
        model = algo.make(SpaceEnv(), seed=0)
        model.set_random_seed(5)
        runs.append(copy_parameters(model.learn(32)))
    assert_same(*runs)


def test_starts_like_ppo(algo: Algorithm) -> None:
    """What an algorithm builds besides PPO's networks draws no random numbers: rollouts are those of PPO."""
    entries = (algo.with_plain_policy(), Algorithm(PPO))
    own, reference = (entry.make(SpaceEnv(action_space="box")).policy.state_dict() for entry in entries)
    assert_same({name: own[name] for name in reference}, dict(reference))
    assert set(own) - set(reference) == set(auxiliary_head(own))
    actions = []
    for entry in entries:
        env = SpaceEnv(action_space="box")
        entry.make(env).learn(16)
        actions.append(env.actions)
    assert len(actions[0]) == 16
    assert np.array_equal(*actions)
