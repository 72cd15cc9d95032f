"""
What sb3-contrib checks of RecurrentPPO.
"""

import pathlib
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_ppo_ewma import RecurrentPPOEWMA
from tests.battery.algorithms import QUICK
from tests.battery.envs import OBSERVATION_SPACES, VECTOR, SpaceEnv, copies
from tests.battery.helpers import assert_same, assert_trained, copy_parameters, torch_objects

POLICIES = {"vector": "MlpLstmPolicy", "image_channels_last": "CnnLstmPolicy", "dict": "MultiInputLstmPolicy"}
EXTRACTORS = {"image_channels_last": {"features_dim": 8}, "dict": {"cnn_output_dim": 8}}
NETWORKS: dict[str, dict[str, Any]] = {
    "two_lstms": {},
    "shared": {"shared_lstm": True, "enable_critic_lstm": False},
    "actor_only": {"enable_critic_lstm": False},
    "actor_only_unshared_features": {"enable_critic_lstm": False, "share_features_extractor": False},
    "unshared_features": {"share_features_extractor": False},
    "two_layers_with_dropout": {"n_lstm_layers": 2, "lstm_kwargs": {"dropout": 0.5}},
}


def make(space: str = "vector", action_space: Any = "discrete", **overrides: Any) -> RecurrentPPOEWMA:
    """
    :return: a small, quick model
    """
    env = overrides.pop("env", None) or SpaceEnv(OBSERVATION_SPACES[space], action_space, episode_length=6)
    policy_kwargs = {"net_arch": [8], "lstm_hidden_size": 4, **overrides.pop("policy_kwargs", {})}
    if space in EXTRACTORS:
        policy_kwargs["features_extractor_kwargs"] = EXTRACTORS[space]
    return RecurrentPPOEWMA(POLICIES[space], env, **{**QUICK, **overrides}, policy_kwargs=policy_kwargs)


@pytest.mark.long
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("space", POLICIES)
def test_networks(space: str, network: str, tmp_path: pathlib.Path) -> None:
    model = make(space, policy_kwargs=NETWORKS[network])
    before = copy_parameters(model)
    model.learn(32)
    assert_trained(model, before)
    assert all(th.isfinite(value).all() for value in model.proximal_policy.state_dict().values())
    evaluate_policy(model, model.get_env(), n_eval_episodes=2, warn=False)
    model.save(tmp_path / "model")
    data, _, _ = load_from_zip_file(tmp_path / "model", device="cpu")
    assert {name: torch_objects(value) for name, value in data.items() if torch_objects(value)} == {}
    loaded = RecurrentPPOEWMA.load(tmp_path / "model", env=model.get_env(), device="cpu")
    assert_same(copy_parameters(model), copy_parameters(loaded))
    assert loaded.learn(16, reset_num_timesteps=False).num_timesteps == 48


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"shared_lstm": True, "enable_critic_lstm": True}, "choose between"),
        ({"shared_lstm": True, "enable_critic_lstm": False, "share_features_extractor": False}, "not shared"),
    ],
)
def test_networks_that_contradict_themselves(network: dict[str, Any], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        make(policy_kwargs=network)


@pytest.mark.parametrize("action_space", ["box", "box_matrix", "discrete", "multidiscrete"])
@pytest.mark.parametrize("n_envs", [1, 3])
def test_action_spaces(action_space: str, n_envs: int) -> None:
    def make_env() -> SpaceEnv:
        return SpaceEnv(VECTOR, action_space, episode_length=6)

    model = make(env=VecNormalize(DummyVecEnv(copies(make_env, n_envs))), batch_size=12)
    before = copy_parameters(model)
    model.learn(32 * n_envs)
    assert_trained(model, before)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"use_sde": True, "sde_sample_freq": 4, "clip_range_vf": 0.1},
        {"target_kl": 1e-4},
        {"normalize_advantage": False},
        {"ent_coef": 0.1, "clip_range": lambda progress: 0.1 * progress},
    ],
    ids=["sde", "target_kl", "not_normalized", "schedule"],
)
def test_arguments(kwargs: dict[str, Any]) -> None:
    model = make(action_space="box", **kwargs)
    before = copy_parameters(model)
    model.learn(48)
    assert_trained(model, before)


def test_hidden_states_are_handed_on() -> None:
    model = make(action_space=spaces.Box(-1, 1, (1,)), policy_kwargs={"ortho_init": False}).learn(16)
    observation = np.ones((2, 3), np.float32)
    starts = np.ones(2, bool)
    first, state = model.predict(observation, None, starts, deterministic=True)
    assert [part.shape for part in state] == [(1, 2, 4)] * 2  # layers, environments, units
    second, _ = model.predict(observation, state, ~starts, deterministic=True)
    assert not np.array_equal(first, second)
    again, _ = model.predict(observation, state, starts, deterministic=True)
    assert np.allclose(first, again)  # an episode's start forgets the state
    # The average has a memory of its own.
    average, _ = model.proximal_policy.predict(observation, None, starts, deterministic=True)
    assert average.shape == first.shape


def test_same_seed_same_run() -> None:
    runs = [copy_parameters(make(action_space="box", seed=4, use_sde=use_sde).learn(48)) for use_sde in (0, 0, 1, 1)]
    assert_same(runs[0], runs[1])
    assert_same(runs[2], runs[3])


class MemoryEnv(SpaceEnv):
    """
    Shows a bit in the first step of an episode; the second action must repeat it.
    """

    def __init__(self) -> None:
        super().__init__(spaces.Box(-1, 1, (1,)), spaces.Discrete(2), episode_length=2)

    def observation(self) -> Any:
        if self.n_steps == 0:
            self.bit = int(self.np_random.integers(2))
            return np.full(1, 2 * self.bit - 1, np.float32)
        return np.zeros(1, np.float32)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, _, terminated, truncated, info = super().step(action)
        return observation, float(truncated and action == self.bit), terminated, truncated, info


@pytest.mark.long
def test_learns_to_remember() -> None:
    """Without memory, half of the episodes succeed."""
    env = DummyVecEnv(copies(MemoryEnv, 8))
    kwargs = {"n_steps": 16, "batch_size": 128, "n_epochs": 10, "learning_rate": 0.02, "gamma": 0.5}
    model = make(env=env, **kwargs, policy_kwargs={"lstm_hidden_size": 8, "net_arch": []})
    model.learn(2000)
    reward, _ = evaluate_policy(model, env, n_eval_episodes=50, warn=False)
    assert reward > 0.95
