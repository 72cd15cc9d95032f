"""
What sb3-contrib checks of MaskablePPO, with and without an LSTM.
"""

import pathlib
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib import MaskablePPO
from sb3_contrib.common.envs import (
    InvalidActionEnvDiscrete,
    InvalidActionEnvMultiBinary,
    InvalidActionEnvMultiDiscrete,
)
from sb3_contrib.common.maskable.callbacks import MaskableEvalCallback
from sb3_contrib.common.maskable.evaluation import evaluate_policy
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from sb3_contrib.common.maskable.utils import get_action_masks
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from sb3_contrib.common.wrappers import ActionMasker
from stable_baselines3.common.callbacks import StopTrainingOnNoModelImprovement
from stable_baselines3.common.envs import IdentityEnv
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.vec_env import DummyVecEnv

from tests.battery.algorithms import MASKABLE, Algorithm
from tests.battery.envs import OBSERVATION_SPACES, MaskedSpaceEnv, SpaceEnv, copies
from tests.battery.helpers import assert_same, assert_trained, copy_parameters, torch_objects
from tests.battery.test_train_eval_mode import POLICY_KWARGS as NOISY_POLICY_KWARGS
from tests.battery.test_train_eval_mode import statistics


def discrete(n_invalid_actions: int = 3) -> InvalidActionEnvDiscrete:
    """:return: six actions"""
    return InvalidActionEnvDiscrete(dim=6, n_invalid_actions=n_invalid_actions, ep_length=8)


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
    "numbers": lambda: MaskedSpaceEnv(OBSERVATION_SPACES["multidiscrete"]),
}


@pytest.mark.parametrize("case", ENVS)
def test_trains(maskable_algo: Algorithm, case: str, tmp_path: pathlib.Path) -> None:
    env = ENVS[case]()
    model = maskable_algo.make(env)
    before = copy_parameters(model)
    model.learn(32 * model.n_envs)
    assert_trained(model, before)
    if maskable_algo.has_average:
        assert all(th.isfinite(value).all() for value in model.proximal_policy.state_dict().values())
    evaluate_policy(model, env, n_eval_episodes=2, warn=False)
    model.save(tmp_path / "model")
    data, _, _ = load_from_zip_file(tmp_path / "model", device="cpu")
    assert {name: torch_objects(value) for name, value in data.items() if torch_objects(value)} == {}
    loaded = maskable_algo.cls.load(tmp_path / "model", env=env, device="cpu")
    assert_same(copy_parameters(model), copy_parameters(loaded))
    assert loaded.learn(16, reset_num_timesteps=False).num_timesteps == 32 * model.n_envs + 16 * model.n_envs


@pytest.mark.parametrize(
    "env",
    [
        discrete(n_invalid_actions=5),
        InvalidActionEnvMultiDiscrete([2, 3], n_invalid_actions=3, ep_length=8),
        InvalidActionEnvMultiBinary(3, n_invalid_actions=3, ep_length=8),
    ],
    ids=["discrete", "multidiscrete", "multibinary"],
)
def test_masks_leave_the_right_action_only(maskable_algo: Algorithm, env: gym.Env[Any, Any]) -> None:
    model = maskable_algo.make(env)
    assert evaluate_policy(model, env, n_eval_episodes=2, warn=False)[0] == 8
    assert evaluate_policy(model, env, n_eval_episodes=2, warn=False, use_masking=False)[0] < 8
    observation, _ = env.reset()
    for policy in (model, model.proximal_policy) if maskable_algo.has_average else (model,):
        actions = [policy.predict(observation, action_masks=get_action_masks(env))[0] for _ in range(20)]
        assert all(np.array_equal(action, observation) for action in actions)


def test_masks_can_be_switched_off(maskable_algo: Algorithm) -> None:
    env = IdentityEnv(dim=2, ep_length=8)
    model = maskable_algo.make(env)
    with pytest.raises(ValueError, match=r"does not support action masking|must have a method action_masks\(\)"):
        model.learn(16)
    before = copy_parameters(model)
    model.learn(32, use_masking=False)
    assert_trained(model, before)


def test_masks_from_a_wrapper(maskable_algo: Algorithm) -> None:
    env = SpaceEnv()
    model = maskable_algo.make(ActionMasker(env, lambda _: np.array([True, False, True])))
    model.learn(32)
    assert set(map(int, env.actions)) == {0, 2}


def test_other_policies_are_refused(maskable_algo: Algorithm) -> None:
    others: list[tuple[type, str]] = [(ActorCriticPolicy, "Policy")]
    if maskable_algo.is_recurrent:
        others.append((RecurrentActorCriticPolicy, "MaskedLstmPolicy|MaskedRecurrentPPGPolicy, which takes"))
    elif maskable_algo.has_phases:
        others.append((MaskableActorCriticPolicy, "MaskablePPGPolicy, which has the auxiliary value head"))
    for other, message in others:
        with pytest.raises(ValueError, match=message):
            maskable_algo.cls(other, discrete(), device="cpu")


@pytest.mark.parametrize(
    "action_space",
    [spaces.Box(-1, 1, (2,)), spaces.Dict({"a": spaces.Discrete(2)}), spaces.MultiBinary([2, 2])],
    ids=["box", "dict", "matrix"],
)
def test_actions_without_masks_are_refused(maskable_algo: Algorithm, action_space: spaces.Space[Any]) -> None:
    message = "only supports|must be Discrete, MultiDiscrete or MultiBinary|is not supported"
    with pytest.raises((AssertionError, ValueError), match=message):
        maskable_algo.make(SpaceEnv(action_space=action_space))


def test_parameters_are_handed_over(maskable_algo: Algorithm) -> None:
    models = [maskable_algo.make(MaskedSpaceEnv(), seed=seed).learn(48) for seed in (0, 1)]
    parameters = models[0].get_parameters()
    assert not th.equal(parameters["policy"]["action_net.weight"], models[1].policy.action_net.weight)
    models[1].set_parameters(parameters)
    assert_same(copy_parameters(models[1]), copy_parameters(models[0]))
    if maskable_algo.has_average:
        assert_same(*(dict(model.proximal_policy.state_dict()) for model in models))


@pytest.mark.parametrize("algo", [algo for algo in MASKABLE if not algo.is_recurrent], ids=str)
def test_maskable_ppo_is_given_back(algo: Algorithm) -> None:
    model = algo.make(MaskedSpaceEnv()).learn(32)
    plain = model.to_ppo()
    assert type(plain) is MaskablePPO
    before = copy_parameters(plain)
    assert_same(before, copy_parameters(model))
    plain.learn(16, reset_num_timesteps=False)
    assert plain.num_timesteps == 48
    assert_trained(plain, before, phase=False)
    assert_same(copy_parameters(model), before)


def test_policies_are_saved_alone(maskable_algo: Algorithm, tmp_path: pathlib.Path) -> None:
    model = maskable_algo.make(MaskedSpaceEnv()).learn(32)
    masks, observation = np.array([[False, True, True]] * 20), np.zeros((20, 3), np.float32)
    policies = [model.policy, *([model.proximal_policy] if maskable_algo.has_average else [])]
    for policy in policies:
        policy.save(tmp_path / "policy")
        loaded = type(policy).load(tmp_path / "policy", device="cpu")
        assert_same(dict(policy.state_dict()), dict(loaded.state_dict()))
        actions, _ = loaded.predict(observation, action_masks=masks)
        assert set(actions) == {1, 2}


@pytest.mark.filterwarnings("ignore:rich is experimental")
def test_callbacks(maskable_algo: Algorithm, tmp_path: pathlib.Path) -> None:
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
    maskable_algo.make(Monitor(discrete())).learn(48, callback=evaluation, progress_bar=maskable_algo is MASKABLE[0])
    assert stop.n_calls == 3
    assert np.load(tmp_path / "evaluations.npz")["timesteps"].tolist() == [16, 32, 48]
    assert maskable_algo.cls.load(tmp_path / "best_model", device="cpu").num_timesteps in (16, 32, 48)


@pytest.mark.parametrize("algo", [algo for algo in MASKABLE if algo.has_average and not algo.has_phases], ids=str)
def test_statistics_and_dropout_in_training_only(algo: Algorithm) -> None:
    model = algo.make(FirstActionInvalid(), policy_kwargs=NOISY_POLICY_KWARGS)
    before = statistics(model.policy)
    _, callback = model._setup_learn(total_timesteps=16)
    model.collect_rollouts(model.get_env(), callback, model.rollout_buffer, n_rollout_steps=16)
    assert_same(before, statistics(model.policy))
    model.train()
    after = statistics(model.policy)
    assert not any(th.equal(value, after[name]) for name, value in before.items())
    # The proximal policy in evaluation mode, the policy in training mode
    assert set(model.policy.features_extractor.modes) == {(False, False), (True, True)}


def test_same_seed_same_run(maskable_algo: Algorithm) -> None:
    runs = [copy_parameters(maskable_algo.make(MaskedSpaceEnv(), seed=4).learn(32)) for _ in range(2)]
    assert_same(*runs)


@pytest.mark.long
@pytest.mark.parametrize(
    ("algo", "kwargs"),
    [
        (MASKABLE[0], {}),
        (MASKABLE[1], {"n_policy_iterations": 4, "aux_batch_size": None}),
        (MASKABLE[3], {}),
    ],
    ids=str,
)
def test_learns_with_masks(algo: Algorithm, kwargs: dict[str, Any]) -> None:
    """Of 20 actions, 15 are invalid: without masks, or without learning, a fifth of the steps at most is right."""
    np.random.seed(0)
    env = InvalidActionEnvDiscrete(dim=20, n_invalid_actions=15, ep_length=20)
    kwargs = {"gamma": 0.4, "n_steps": 128, "batch_size": 128, "n_epochs": 10, "learning_rate": 0.01, **kwargs}
    size = {"lstm_hidden_size": 32, "net_arch": []} if algo.is_recurrent else {"net_arch": [32]}
    model = algo.make(env, **kwargs, policy_kwargs=size)
    assert evaluate_policy(model, env, n_eval_episodes=5, warn=False, deterministic=False)[0] < 8
    model.learn(1500)
    assert evaluate_policy(model, env, n_eval_episodes=5, warn=False)[0] > 18
