"""
What PPO refuses when it is built, and with which exception.
"""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.vec_env import DummyVecEnv

from tests.battery.algorithms import Algorithm
from tests.battery.envs import OBSERVATION_SPACES, VECTOR, SpaceEnv, copies

NESTED = spaces.Dict({"inner": spaces.Dict({"vector": VECTOR})})

# environment, policy, arguments, exception, part of the message
REFUSED: dict[str, tuple[gym.Env[Any, Any], str, dict[str, Any], type[Exception], str]] = {
    "negative_clip_range_vf": (SpaceEnv(), "MlpPolicy", {"clip_range_vf": -0.2}, AssertionError, "clip_range_vf"),
    "zero_clip_range_vf": (SpaceEnv(), "MlpPolicy", {"clip_range_vf": 0.0}, AssertionError, "clip_range_vf"),
    "batch_of_one": (SpaceEnv(), "MlpPolicy", {"batch_size": 1}, AssertionError, "batch_size"),
    "rollout_of_one": (SpaceEnv(), "MlpPolicy", {"n_steps": 1}, AssertionError, "n_steps"),
    "unknown_policy": (SpaceEnv(), "CartPolicy", {}, ValueError, "CartPolicy"),
    "mlp_for_dict": (SpaceEnv(OBSERVATION_SPACES["dict"]), "MlpPolicy", {}, ValueError, "MultiInputPolicy"),
    "cnn_for_dict": (SpaceEnv(OBSERVATION_SPACES["dict"]), "CnnPolicy", {}, ValueError, "MultiInputPolicy"),
    "cnn_for_vector": (SpaceEnv(), "CnnPolicy", {}, AssertionError, "CnnPolicy"),
    "nested_dict": (SpaceEnv(NESTED), "MultiInputPolicy", {}, NotImplementedError, "[Nn]ested"),
    "dict_actions": (SpaceEnv(action_space=NESTED), "MlpPolicy", {}, AssertionError, "only supports"),
    "tuple_actions": (
        SpaceEnv(action_space=spaces.Tuple([VECTOR, VECTOR])),
        "MlpPolicy",
        {},
        AssertionError,
        "only supports",
    ),
    "multibinary_matrix_actions": (
        SpaceEnv(action_space=spaces.MultiBinary([2, 3])),
        "MlpPolicy",
        {},
        AssertionError,
        "MultiBinary",
    ),
    "unbounded_actions": (
        SpaceEnv(action_space=spaces.Box(-np.inf, np.inf, (1,))),
        "MlpPolicy",
        {},
        AssertionError,
        "finite",
    ),
    "sde_for_discrete": (SpaceEnv(), "MlpPolicy", {"use_sde": True}, ValueError, "gSDE"),
    "squash_without_sde": (
        SpaceEnv(action_space="box"),
        "MlpPolicy",
        {"policy_kwargs": {"squash_output": True}},
        AssertionError,
        "use_sde=True",
    ),
    "unknown_policy_argument": (SpaceEnv(), "MlpPolicy", {"policy_kwargs": {"depth": 3}}, TypeError, "depth"),
    "unknown_argument": (SpaceEnv(), "MlpPolicy", {"depth": 3}, TypeError, "depth"),
    "unknown_buffer_argument": (SpaceEnv(), "MlpPolicy", {"rollout_buffer_kwargs": {"depth": 3}}, TypeError, "depth"),
    "buffer_argument_twice": (
        SpaceEnv(),
        "MlpPolicy",
        {"rollout_buffer_class": RolloutBuffer, "rollout_buffer_kwargs": {"gamma": 1}},
        TypeError,
        "gamma",
    ),
    "buffer_for_dict": (
        SpaceEnv(),
        "MlpPolicy",
        {"rollout_buffer_class": DictRolloutBuffer},
        AssertionError,
        "Dict obs space",
    ),
    "image_normalised_twice": (
        SpaceEnv(spaces.Box(0, 1, (1, 36, 36), np.float32)),
        "CnnPolicy",
        {"policy_kwargs": {"features_extractor_kwargs": {"features_dim": 8}}},
        AssertionError,
        "normalize_images",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")
def test_refuses_what_ppo_refuses(algo: Algorithm, case: str) -> None:
    env, policy, kwargs, exception, message = REFUSED[case]
    for cls, own_kwargs in ((PPO, {}), (algo.cls, {**algo.kwargs, **algo.normalizing_as_ppo()})):
        with pytest.raises(exception, match=message):
            cls(policy, env, **{"n_steps": 16, "device": "cpu", **own_kwargs, **kwargs})


def test_number_of_environments_is_fixed(algo: Algorithm) -> None:
    model = algo.make(SpaceEnv())
    with pytest.raises(AssertionError, match="number of environments"):
        model.set_env(DummyVecEnv(copies(SpaceEnv, 2)))


def test_other_spaces_are_refused(algo: Algorithm) -> None:
    model = algo.make(SpaceEnv())
    with pytest.raises(ValueError, match="Observation spaces do not match"):
        model.set_env(SpaceEnv(OBSERVATION_SPACES["matrix"]))
    with pytest.raises(ValueError, match="Action spaces do not match"):
        model.set_env(SpaceEnv(action_space="box"))
