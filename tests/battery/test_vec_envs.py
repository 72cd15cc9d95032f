"""
Vectorised environments and their wrappers.
"""

import pathlib

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import SimpleMultiObsEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecCheckNan,
    VecExtractDictObs,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
)

from tests.battery.algorithms import Algorithm
from tests.battery.envs import OBSERVATION_SPACES, VECTOR, SpaceEnv, copies
from tests.battery.helpers import assert_same, assert_trained, copy_parameters

pytestmark = pytest.mark.long


def image_env() -> SpaceEnv:
    """:return: images with the channels last"""
    return SpaceEnv(OBSERVATION_SPACES["image_channels_last"])


def dict_env() -> SpaceEnv:
    """:return: images, vectors and numbers"""
    return SpaceEnv(OBSERVATION_SPACES["dict"])


@pytest.mark.parametrize("keys", [None, ["vector"]], ids=["vector", "dict"])
def test_normalised(algo: Algorithm, keys: list[str] | None, tmp_path: pathlib.Path) -> None:
    make = SpaceEnv if keys is None else dict_env
    env = VecNormalize(DummyVecEnv(copies(make, 2)), norm_obs_keys=keys, clip_reward=1.5)
    model = algo.make(env)
    assert model.get_vec_normalize_env() is env
    before = copy_parameters(model)
    model.learn(64)
    assert_trained(model, before)
    observations = model.rollout_buffer.observations
    vectors = observations["vector"] if isinstance(observations, dict) else observations
    assert np.abs(vectors).max() > 1  # outside of the space: normalised before it was stored
    # Time-limit bootstrapping is added to the clipped reward.
    assert np.sort(np.abs(model.rollout_buffer.rewards).flatten())[: 32 - 4].max() <= 1.5

    model.save(tmp_path / "model")
    env.save(str(tmp_path / "env.pkl"))
    restored_env = VecNormalize.load(str(tmp_path / "env.pkl"), DummyVecEnv(copies(make, 2)))
    restored = algo.cls.load(tmp_path / "model", env=restored_env, device="cpu")
    assert restored.get_vec_normalize_env() is restored_env
    restored.learn(32)
    assert restored_env.ret_rms.count > env.ret_rms.count


def test_normalisation_of_another_environment(algo: Algorithm) -> None:
    env, other = VecNormalize(DummyVecEnv([SpaceEnv])), VecNormalize(DummyVecEnv([SpaceEnv]), training=False)
    model = algo.make(env)
    model.set_env(other)
    assert model.get_vec_normalize_env() is other
    model.learn(16)
    assert other.obs_rms.count == pytest.approx(1e-4)
    model.set_env(env)
    model.learn(16)
    assert env.obs_rms.count > 16


def test_stacked_images(algo: Algorithm) -> None:
    env = VecFrameStack(DummyVecEnv([image_env]), 2)
    model = algo.make(env)
    assert model.observation_space.shape == (6, 36, 36)
    before = copy_parameters(model)
    model.learn(32)
    assert_trained(model, before)


@pytest.mark.parametrize("channel_last", [True, False], ids=["last", "first"])
def test_stacked_dict(algo: Algorithm, channel_last: bool) -> None:
    def make() -> gym.Env:
        return SimpleMultiObsEnv(random_start=True, discrete_actions=True, channel_last=channel_last)

    order = {"vec": None, "img": "last" if channel_last else "first"}
    env = VecFrameStack(DummyVecEnv([make]), n_stack=3, channels_order=order)
    model = algo.make(env)
    before = copy_parameters(model)
    model.learn(32)
    assert_trained(model, before)
    evaluate_policy(model, env, n_eval_episodes=1, warn=False)


def test_subprocesses_are_the_same_as_one_process(algo: Algorithm) -> None:
    parameters = []
    for vec_env_cls in (DummyVecEnv, SubprocVecEnv):
        env = make_vec_env(dict_env, n_envs=2, seed=3, vec_env_cls=vec_env_cls)
        model = algo.make(env, n_steps=8, batch_size=8).learn(32)
        env.close()
        parameters.append(copy_parameters(model))
    assert_same(parameters[0], parameters[1])


def test_monitored_checked_extracted(algo: Algorithm, tmp_path: pathlib.Path) -> None:
    inner = DummyVecEnv(copies(dict_env, 2))
    env = VecMonitor(VecCheckNan(VecExtractDictObs(inner, key="vector")), filename=str(tmp_path / "monitor"))
    model = algo.make(env)
    assert model.observation_space == VECTOR
    model.learn(32)
    env.close()
    lines = (tmp_path / "monitor.monitor.csv").read_text().splitlines()
    assert len(lines) == 2 + 4  # a comment, the names, and two episodes of 8 steps in two environments


def test_environments_are_monitored(algo: Algorithm) -> None:
    for env in (SpaceEnv(), Monitor(SpaceEnv())):
        assert algo.make(env).get_env().env_is_wrapped(Monitor) == [True]


def test_time_limits_end_episodes(algo: Algorithm) -> None:
    env = gym.wrappers.TimeLimit(SpaceEnv(spaces.Box(-1, 1, (2,)), episode_length=100), 5)
    model = algo.make(env).learn(32)
    assert [info["l"] for info in model.ep_info_buffer] == [5] * 6
