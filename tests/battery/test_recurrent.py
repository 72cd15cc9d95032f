"""
What sb3-contrib checks of RecurrentPPO, with and without masks.
"""

import pathlib
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib import RecurrentPPO
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from tests.battery.algorithms import RECURRENT, Algorithm
from tests.battery.envs import OBSERVATION_SPACES, VECTOR, MaskedSpaceEnv, SpaceEnv, copies
from tests.battery.helpers import assert_same, assert_trained, copy_parameters, torch_objects

SPACES = ("vector", "image_channels_last", "dict")
NETWORKS: dict[str, dict[str, Any]] = {
    "two_lstms": {},
    "shared": {"shared_lstm": True, "enable_critic_lstm": False},
    "actor_only": {"enable_critic_lstm": False},
    "actor_only_unshared_features": {"enable_critic_lstm": False, "share_features_extractor": False},
    "unshared_features": {"share_features_extractor": False},
    "shared_features": {"share_features_extractor": True},
    "two_layers_with_dropout": {"n_lstm_layers": 2, "lstm_kwargs": {"dropout": 0.5}},
}
PLAIN = RECURRENT[0]
COMBINATIONS = [
    *((PLAIN, space, network) for space in SPACES for network in NETWORKS if network != "shared_features"),
    *(
        (algo, *case)
        for algo in RECURRENT[1:]
        for case in [("vector", "two_lstms"), ("image_channels_last", "two_lstms"), ("dict", "shared")]
    ),
    *(
        (algo, "vector", network)
        for algo in RECURRENT[1:]
        for network in ("actor_only", "shared_features", "two_layers_with_dropout")
        if not algo.label
    ),
]
WITHOUT_MASKS = [algo for algo in RECURRENT if not algo.has_masks]
unmasked = pytest.mark.parametrize("algo", WITHOUT_MASKS, ids=str)


def small_env(algo: Algorithm, space: Any = VECTOR, action_space: Any = "discrete") -> SpaceEnv:
    """
    :return: an environment with masks, if the algorithm takes them
    """
    return (MaskedSpaceEnv if algo.has_masks else SpaceEnv)(space, action_space, episode_length=6)


@pytest.mark.long
@pytest.mark.parametrize(("algo", "space", "network"), COMBINATIONS, ids=str)
def test_networks(algo: Algorithm, space: str, network: str, tmp_path: pathlib.Path) -> None:
    model = algo.make(small_env(algo, OBSERVATION_SPACES[space]), policy_kwargs=NETWORKS[network])
    before = copy_parameters(model)
    model.learn(32)
    assert_trained(model, before)
    if algo.has_average:
        assert all(th.isfinite(value).all() for value in model.proximal_policy.state_dict().values())
    if not algo.has_masks:
        evaluate_policy(model, model.get_env(), n_eval_episodes=2, warn=False)
    model.save(tmp_path / "model")
    data, _, _ = load_from_zip_file(tmp_path / "model", device="cpu")
    assert {name: torch_objects(value) for name, value in data.items() if torch_objects(value)} == {}
    loaded = algo.cls.load(tmp_path / "model", env=model.get_env(), device="cpu")
    assert_same(copy_parameters(model), copy_parameters(loaded))
    assert loaded.learn(16, reset_num_timesteps=False).num_timesteps == 48


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"shared_lstm": True, "enable_critic_lstm": True}, "choose between|enable_critic_lstm=True"),
        (
            {"shared_lstm": True, "enable_critic_lstm": False, "share_features_extractor": False},
            "not shared|share_features_extractor=False",
        ),
    ],
)
def test_networks_that_contradict_themselves(recurrent_algo: Algorithm, network: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError if recurrent_algo.has_phases else AssertionError, match=message):
        recurrent_algo.make(small_env(recurrent_algo), policy_kwargs=network)


# Of MultiBinary actions, sb3-contrib's RecurrentPPO cannot compute the loss: its buffer gives it integers.
@pytest.mark.parametrize(
    ("action_space", "n_envs"),
    [("box", 1), ("box", 3), ("box_matrix", 1), ("discrete", 1), ("multidiscrete", 3), ("multibinary", 3)],
)
def test_action_spaces(recurrent_algo: Algorithm, action_space: str, n_envs: int) -> None:
    if recurrent_algo.has_masks and action_space.startswith("box"):
        return  # refused, see test_maskable.py

    def make_env() -> SpaceEnv:
        return small_env(recurrent_algo, action_space=action_space)

    model = recurrent_algo.make(VecNormalize(DummyVecEnv(copies(make_env, n_envs))), batch_size=12)
    before = copy_parameters(model)
    model.learn(32 * n_envs)
    assert_trained(model, before)


# sb3-contrib's own policies refuse MultiDiscrete: its features are counted in numpy's integers, which an LSTM refuses.
@pytest.mark.parametrize("space", ["discrete", "multidiscrete", "multibinary", "matrix", "vector_float64"])
def test_observation_spaces(recurrent_algo: Algorithm, space: str) -> None:
    if space == "multidiscrete" and recurrent_algo is PLAIN:
        return
    model = recurrent_algo.make(small_env(recurrent_algo, OBSERVATION_SPACES[space]))
    before = copy_parameters(model)
    assert_trained(model.learn(32), before)


@unmasked
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
def test_arguments(algo: Algorithm, kwargs: dict[str, Any]) -> None:
    model = algo.make(small_env(algo, action_space="box"), **kwargs)
    before = copy_parameters(model)
    model.learn(48)
    assert_trained(model, before)


def test_hidden_states_are_handed_on(recurrent_algo: Algorithm) -> None:
    model = recurrent_algo.make(small_env(recurrent_algo), policy_kwargs={"ortho_init": False})
    policy: Any = model.policy
    with th.no_grad():
        policy.action_net.weight.mul_(100)  # every state has an action of its own
    observation = np.random.RandomState(0).normal(size=(32, 3)).astype(np.float32)
    starts = np.ones(32, bool)
    first, state = model.predict(observation, None, starts, deterministic=True)
    assert [part.shape for part in state] == [(1, 32, 4)] * 2  # layers, environments, units
    second, later = model.predict(observation, state, ~starts, deterministic=True)
    assert not np.array_equal(first, second)
    assert not np.array_equal(state[0], later[0])
    again, state_again = model.predict(observation, state, starts, deterministic=True)
    assert_same(state_again, state)  # an episode's start forgets the state
    assert np.array_equal(first, again)
    if recurrent_algo.has_average:  # which has a memory of its own
        average, _ = model.proximal_policy.predict(observation, None, starts, deterministic=True)
        assert average.shape == first.shape


def test_policies_are_saved_alone(recurrent_algo: Algorithm, tmp_path: pathlib.Path) -> None:
    if recurrent_algo is PLAIN:
        return  # sb3-contrib's policies leave out the LSTM's size
    kwargs = {"lstm_hidden_size": 3, "n_lstm_layers": 2, "shared_lstm": True, "enable_critic_lstm": False}
    model = recurrent_algo.make(small_env(recurrent_algo), policy_kwargs=kwargs).learn(32)
    model.policy.save(tmp_path / "policy")
    loaded = type(model.policy).load(tmp_path / "policy", device="cpu")
    assert_same(dict(model.policy.state_dict()), dict(loaded.state_dict()))
    observation = np.ones((2, 3), np.float32)
    predictions = [policy.predict(observation, deterministic=True) for policy in (model.policy, loaded)]
    assert_same(*predictions)


def test_parameters_are_handed_over(recurrent_algo: Algorithm) -> None:
    models = [recurrent_algo.make(small_env(recurrent_algo), seed=seed).learn(48) for seed in (0, 1)]
    parameters = models[0].get_parameters()
    assert not th.equal(parameters["policy"]["action_net.weight"], models[1].policy.action_net.weight)
    models[1].set_parameters(parameters)
    assert_same(copy_parameters(models[1]), copy_parameters(models[0]))
    if recurrent_algo.has_average:
        averages = [dict(model.proximal_policy.state_dict()) for model in models]
        assert_same(*averages)
    with pytest.raises(ValueError, match="not match"):
        models[1].set_parameters({"policy": parameters["policy"]})


def test_recurrent_ppo_is_given_back(recurrent_algo: Algorithm, tmp_path: pathlib.Path) -> None:
    model = recurrent_algo.make(small_env(recurrent_algo)).learn(32)
    plain = model.to_ppo()
    assert type(plain) is RecurrentPPO
    assert_same(copy_parameters(plain), copy_parameters(model))
    plain.save(tmp_path / "plain")
    loaded = RecurrentPPO.load(tmp_path / "plain", device="cpu")
    observation = np.ones((2, 3), np.float32)
    assert_same(*(each.predict(observation, deterministic=True) for each in (loaded, model)))
    before = copy_parameters(plain)
    if not recurrent_algo.has_masks:  # its environments fail without
        plain.learn(16, reset_num_timesteps=False)
        assert plain.num_timesteps == 48
        assert_trained(plain, before, phase=False)
    assert_same(copy_parameters(model), before)


@unmasked
def test_evaluation_callback(algo: Algorithm, tmp_path: pathlib.Path) -> None:
    env = Monitor(small_env(algo))
    evaluation = EvalCallback(env, eval_freq=16, n_eval_episodes=2, best_model_save_path=str(tmp_path), verbose=0)
    algo.make(Monitor(small_env(algo))).learn(48, evaluation)
    assert algo.cls.load(tmp_path / "best_model", device="cpu").num_timesteps in (16, 32, 48)


def test_same_seed_same_run(recurrent_algo: Algorithm) -> None:
    runs = [copy_parameters(recurrent_algo.make(small_env(recurrent_algo), seed=4).learn(32)) for _ in range(2)]
    assert_same(*runs)
    if not recurrent_algo.has_masks:
        env = small_env(recurrent_algo, action_space="box")
        runs = [copy_parameters(recurrent_algo.make(env, seed=4, use_sde=True).learn(32)) for _ in range(2)]
        assert_same(*runs)


class MemoryEnv(SpaceEnv):
    """
    Shows a bit in the first step of an episode; the second action must repeat it.
    """

    def __init__(self) -> None:
        super().__init__(spaces.Box(-1, 1, (1,)), spaces.Discrete(3), episode_length=2)

    def observation(self) -> Any:
        if self.n_steps == 0:
            self.bit = int(self.np_random.integers(2))
            return np.full(1, 2 * self.bit - 1, np.float32)
        return np.zeros(1, np.float32)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, _, terminated, truncated, info = super().step(action)
        return observation, float(truncated and action == self.bit), terminated, truncated, info

    def action_masks(self) -> np.ndarray:
        return np.array([True, True, False])


@pytest.mark.long
@pytest.mark.parametrize(
    ("algo", "kwargs"),
    [
        (RECURRENT[0], {}),
        (RECURRENT[1], {"n_policy_iterations": 4, "aux_batch_size": None, "aux_learning_rate": 3e-3}),
        (RECURRENT[4], {"n_policy_iterations": 4, "aux_batch_size": None, "aux_learning_rate": 3e-3}),
    ],
    ids=str,
)
def test_learns_to_remember(algo: Algorithm, kwargs: dict[str, Any]) -> None:
    """Without memory, half of the episodes succeed."""
    env = DummyVecEnv(copies(MemoryEnv, 8))
    kwargs = {"n_steps": 16, "batch_size": 128, "n_epochs": 10, "learning_rate": 0.02, "gamma": 0.5, **kwargs}
    model = algo.make(env, **kwargs, policy_kwargs={"lstm_hidden_size": 8, "net_arch": []})
    model.learn(2000)
    rewards = []
    observation, state, starts = env.reset(), None, np.ones(8, bool)
    for _ in range(12):
        masks = {"action_masks": np.stack(env.env_method("action_masks"))} if algo.has_masks else {}
        actions, state = model.predict(observation, state, starts, deterministic=True, **masks)
        observation, reward, starts, _ = env.step(actions)
        rewards += reward[starts].tolist()
    assert len(rewards) == 48
    assert np.mean(rewards) > 0.95
