"""
What sb3-contrib checks of MaskablePPO.
"""

import pathlib
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib.common.envs import (
    InvalidActionEnvDiscrete,
    InvalidActionEnvMultiBinary,
    InvalidActionEnvMultiDiscrete,
)
from sb3_contrib.common.maskable.callbacks import MaskableEvalCallback
from sb3_contrib.common.maskable.evaluation import evaluate_policy
from sb3_contrib.common.maskable.utils import get_action_masks
from sb3_contrib.common.wrappers import ActionMasker
from stable_baselines3.common.callbacks import StopTrainingOnNoModelImprovement
from stable_baselines3.common.envs import IdentityEnv, IdentityEnvBox
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_ppo_ewma import MaskablePPOEWMA
from tests.battery.algorithms import POLICY_KWARGS, QUICK, policy_name
from tests.battery.envs import OBSERVATION_SPACES, SpaceEnv, copies
from tests.battery.helpers import assert_same, assert_trained, copy_parameters
from tests.battery.test_train_eval_mode import POLICY_KWARGS as NOISY_POLICY_KWARGS
from tests.battery.test_train_eval_mode import statistics


def discrete(n_invalid_actions: int = 3) -> InvalidActionEnvDiscrete:
    """:return: six actions"""
    return InvalidActionEnvDiscrete(dim=6, n_invalid_actions=n_invalid_actions, ep_length=8)


def make(env: Any, **overrides: Any) -> MaskablePPOEWMA:
    """
    :return: a small, quick model
    """
    name = policy_name(env.observation_space)
    policy_kwargs = {**POLICY_KWARGS[name], **overrides.pop("policy_kwargs", {})}
    return MaskablePPOEWMA(name, env, **{**QUICK, **overrides}, policy_kwargs=policy_kwargs)


class FirstActionInvalid(SpaceEnv):
    """
    Fails when the first action is taken.
    """

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert action != 0
        return super().step(action)

    def action_masks(self) -> np.ndarray:
        return np.array([False, True, True])


ENVS: dict[str, Any] = {
    "discrete": discrete,
    "multidiscrete": lambda: InvalidActionEnvMultiDiscrete([2, 3], n_invalid_actions=1, ep_length=8),
    "multibinary": lambda: InvalidActionEnvMultiBinary(3, n_invalid_actions=1, ep_length=8),
    "image": lambda: FirstActionInvalid(OBSERVATION_SPACES["image_channels_last"]),
    "dict": lambda: FirstActionInvalid(OBSERVATION_SPACES["dict"]),
    "several": lambda: DummyVecEnv(copies(discrete, 2)),
}


@pytest.mark.parametrize("case", ENVS)
def test_trains(case: str, tmp_path: pathlib.Path) -> None:
    env = ENVS[case]()
    model = make(env)
    before = copy_parameters(model)
    model.learn(48 * model.n_envs)
    assert_trained(model, before)
    assert all(th.isfinite(value).all() for value in model.proximal_policy.state_dict().values())
    evaluate_policy(model, env, n_eval_episodes=2, warn=False)
    model.save(tmp_path / "model")
    loaded = MaskablePPOEWMA.load(tmp_path / "model", env=env, device="cpu")
    assert_same(copy_parameters(model), copy_parameters(loaded))
    assert loaded.learn(16, reset_num_timesteps=False).num_timesteps == 48 * model.n_envs + 16 * model.n_envs


@pytest.mark.parametrize(
    "env",
    [
        discrete(n_invalid_actions=5),
        InvalidActionEnvMultiDiscrete([2, 3], n_invalid_actions=3, ep_length=8),
        InvalidActionEnvMultiBinary(3, n_invalid_actions=3, ep_length=8),
    ],
    ids=["discrete", "multidiscrete", "multibinary"],
)
def test_masks_leave_the_right_action_only(env: gym.Env[Any, Any]) -> None:
    model = make(env)
    assert evaluate_policy(model, env, n_eval_episodes=2, warn=False)[0] == 8
    assert evaluate_policy(model, env, n_eval_episodes=2, warn=False, use_masking=False)[0] < 8
    observation, _ = env.reset()
    for policy in (model, model.proximal_policy):
        actions = [policy.predict(observation, action_masks=get_action_masks(env))[0] for _ in range(20)]
        assert all(np.array_equal(action, observation) for action in actions)


def test_masks_can_be_switched_off() -> None:
    env = IdentityEnv(dim=2, ep_length=8)
    model = make(env)
    with pytest.raises(ValueError, match="does not support action masking"):
        model.learn(16)
    before = copy_parameters(model)
    model.learn(32, use_masking=False)
    assert_trained(model, before)


def test_masks_from_a_wrapper() -> None:
    env = SpaceEnv()
    model = make(ActionMasker(env, lambda _: np.array([True, False, True])))
    model.learn(32)
    assert set(map(int, env.actions)) == {0, 2}


def test_other_policies_and_actions_are_refused() -> None:
    with pytest.raises(ValueError, match="MaskableActorCriticPolicy"):
        MaskablePPOEWMA(ActorCriticPolicy, discrete(), device="cpu")
    with pytest.raises(AssertionError, match="only supports"):
        MaskablePPOEWMA("MlpPolicy", IdentityEnvBox(), device="cpu")
    with pytest.raises(AssertionError, match="only supports"):
        MaskablePPOEWMA("MlpPolicy", SpaceEnv(action_space=spaces.Dict({"a": spaces.Discrete(2)})), device="cpu")


@pytest.mark.filterwarnings("ignore:rich is experimental")
def test_callbacks(tmp_path: pathlib.Path) -> None:
    stop = StopTrainingOnNoModelImprovement(100)
    evaluation = MaskableEvalCallback(
        Monitor(discrete()),
        eval_freq=16,
        n_eval_episodes=2,
        callback_after_eval=stop,
        log_path=str(tmp_path),
        best_model_save_path=str(tmp_path),
        verbose=0,
    )
    make(Monitor(discrete())).learn(48, callback=evaluation, progress_bar=True)
    assert stop.n_calls == 3
    assert np.load(tmp_path / "evaluations.npz")["timesteps"].tolist() == [16, 32, 48]
    assert MaskablePPOEWMA.load(tmp_path / "best_model", device="cpu").num_timesteps in (16, 32, 48)


def test_statistics_and_dropout_in_training_only() -> None:
    model = make(FirstActionInvalid(), policy_kwargs=NOISY_POLICY_KWARGS)
    before = statistics(model.policy)
    _, callback = model._setup_learn(total_timesteps=16)
    model.collect_rollouts(model.get_env(), callback, model.rollout_buffer, n_rollout_steps=16)
    assert_same(before, statistics(model.policy))
    model.train()
    after = statistics(model.policy)
    assert not any(th.equal(value, after[name]) for name, value in before.items())
    # The proximal policy in evaluation mode, the policy in training mode
    assert set(model.policy.features_extractor.modes) == {(False, False), (True, True)}


def test_same_seed_same_run() -> None:
    runs = [copy_parameters(make(FirstActionInvalid(), seed=4).learn(48)) for _ in range(2)]
    assert_same(*runs)


@pytest.mark.long
def test_learns_with_masks() -> None:
    """Of 20 actions, 15 are invalid: without masks, or without learning, a fifth of the steps at most is right."""
    np.random.seed(0)
    env = InvalidActionEnvDiscrete(dim=20, n_invalid_actions=15, ep_length=20)
    kwargs = {"gamma": 0.4, "n_steps": 128, "batch_size": 128, "n_epochs": 10, "learning_rate": 0.01}
    model = make(env, **kwargs, policy_kwargs={"net_arch": [32]})
    assert evaluate_policy(model, env, n_eval_episodes=5, warn=False, deterministic=False)[0] < 8
    model.learn(1500)
    assert evaluate_policy(model, env, n_eval_episodes=5, warn=False)[0] > 18
