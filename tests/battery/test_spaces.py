"""
Action and observation spaces.
"""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecTransposeImage, is_vecenv_wrapped

from sb3_ppo_ewma import ImpalaCNN
from tests.battery.algorithms import Algorithm
from tests.battery.envs import ACTION_SPACES, OBSERVATION_SPACES, VECTOR, SpaceEnv
from tests.battery.helpers import assert_same, assert_trained, copy_parameters


@pytest.mark.long
@pytest.mark.parametrize("action_space", ACTION_SPACES)
@pytest.mark.parametrize("observation_space", OBSERVATION_SPACES)
def test_trains_on_every_pair_of_spaces(algo: Algorithm, observation_space: str, action_space: str) -> None:
    env = SpaceEnv(OBSERVATION_SPACES[observation_space], action_space)
    model = algo.make(env)
    before = copy_parameters(model)
    model.learn(48)
    assert model.num_timesteps == 48
    assert_trained(model, before)

    observation, _ = env.reset(seed=1)
    for deterministic in (False, True):
        action, _ = model.predict(observation, deterministic=deterministic)
        assert env.action_space.contains(action)


IMPALA_SPACES = {
    "channels_last": OBSERVATION_SPACES["image_channels_last"],
    "channels_first": OBSERVATION_SPACES["image_channels_first"],
    "grid": spaces.Box(0, 1, (5, 5, 4), np.bool_),  # as in MinAtar; no image for SB3
}
IMPALA_PAIRS = [("channels_last", name) for name in ACTION_SPACES] + [("channels_first", "box"), ("grid", "discrete")]


@pytest.mark.long
@pytest.mark.parametrize(("observation_space", "action_space"), IMPALA_PAIRS)
def test_impala_policy(own_algo: Algorithm, observation_space: str, action_space: str) -> None:
    env = SpaceEnv(IMPALA_SPACES[observation_space], action_space)
    extractor_kwargs = {"channels": (4, 4), "n_blocks": 1, "features_dim": 8}
    model = own_algo.make(env, policy="ImpalaPolicy", policy_kwargs={"features_extractor_kwargs": extractor_kwargs})
    assert any(isinstance(module, ImpalaCNN) for module in model.policy.modules())
    before = copy_parameters(model)
    model.learn(32)
    assert_trained(model, before)
    assert env.action_space.contains(model.predict(env.observation())[0])


def test_actions_stay_within_the_bounds(algo: Algorithm) -> None:
    env = SpaceEnv(action_space="box")
    model = algo.make(env, policy_kwargs={"log_std_init": 2.0})
    model.learn(32)
    # Samples have a standard deviation of 7.4, so some reach a bound; the buffer keeps them as they were sampled.
    assert np.abs(env.actions).max() == 2
    assert np.abs(model.rollout_buffer.actions).max() > 2


def test_image_channels(algo: Algorithm) -> None:
    last = algo.make(SpaceEnv(OBSERVATION_SPACES["image_channels_last"]))
    first = algo.make(SpaceEnv(OBSERVATION_SPACES["image_channels_first"]))
    assert is_vecenv_wrapped(last.get_env(), VecTransposeImage)
    assert not is_vecenv_wrapped(first.get_env(), VecTransposeImage)
    assert last.observation_space.shape == first.observation_space.shape == (3, 36, 36)


def test_image_that_is_already_normalised(algo: Algorithm) -> None:
    env = SpaceEnv(spaces.Box(0, 1, (1, 36, 36), np.float32))
    policy_kwargs = {"net_arch": [8], "normalize_images": False, "features_extractor_kwargs": {"features_dim": 8}}
    model = algo.make(env, policy="CnnPolicy", policy_kwargs=policy_kwargs)
    before = copy_parameters(model)
    model.learn(32)
    assert_trained(model, before)


def test_dict_of_one_vector_is_the_vector(algo: Algorithm) -> None:
    nested_env = SpaceEnv(spaces.Dict({"vector": VECTOR}))
    flat_env = gym.wrappers.FlattenObservation(SpaceEnv(spaces.Dict({"vector": VECTOR})))
    nested = algo.make(nested_env, policy_kwargs={"features_extractor_kwargs": {}}).learn(32)
    flat = algo.make(flat_env).learn(32)
    assert_same(list(nested.policy.parameters()), list(flat.policy.parameters()))
    observations = np.stack([VECTOR.sample() for _ in range(10)])
    nested_actions, _ = nested.predict({"vector": observations}, deterministic=True)
    flat_actions, _ = flat.predict(observations, deterministic=True)
    assert np.array_equal(nested_actions, flat_actions)


def test_goals(algo: Algorithm) -> None:
    model = algo.make(BitFlippingEnv(n_bits=3, continuous=True)).learn(32)
    evaluate_policy(model, model.get_env(), n_eval_episodes=1)


def test_many_discrete_states(algo: Algorithm) -> None:
    model = algo.make(make_vec_env("CliffWalking-v1", n_envs=2, seed=0))
    model.learn(64)
    assert model.num_timesteps == 64


class SubclassOfBox(spaces.Box):
    """Spaces are recognised by what they are, not by their name."""


def test_subclass_of_a_space(algo: Algorithm) -> None:
    env = SpaceEnv(SubclassOfBox(-1, 1, (3,)), SubclassOfBox(-1, 1, (2,)))
    model = algo.make(env).learn(16)
    env.reset(seed=0)
    env.step(model.predict(env.observation())[0])
