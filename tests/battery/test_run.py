"""
Learning: arguments, schedules, early stopping, how long it runs.
"""

import inspect
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv

from tests.battery.algorithms import Algorithm
from tests.battery.envs import SpaceEnv, box_env, copies
from tests.battery.helpers import assert_same, assert_trained, copy_parameters, record_log, unchanged


@pytest.mark.parametrize(
    "kwargs",
    [
        {"clip_range_vf": 0.2},
        {"clip_range_vf": 1},
        {"normalize_advantage": False},
        {"normalize_advantage": False, "batch_size": 1},
        {"ent_coef": 0.01},
        {"vf_coef": 0.1, "max_grad_norm": 0.1},
        {"gamma": 1.0, "gae_lambda": 1.0},
        {"gae_lambda": 0.0},
        {"n_epochs": 1},
        {"batch_size": 64},
        {"target_kl": 1e6},
        {"learning_rate": 1e-2},
    ],
    ids=lambda kwargs: "-".join(f"{key}={value}" for key, value in kwargs.items()),
)
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")
def test_arguments(algo: Algorithm, env_id: str, kwargs: dict[str, Any]) -> None:
    own = algo.normalizing_as_ppo() if "normalize_advantage" in kwargs else {}
    model = algo.make(env_id, **kwargs, **own)
    before = copy_parameters(model)
    model.learn(32)
    assert_trained(model, before)


@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")
def test_positional_arguments_are_those_of_ppo(algo: Algorithm) -> None:
    parameters = [p for p in inspect.signature(PPO).parameters.values() if p.name not in ("policy", "env")]
    defaults = [p.default for p in parameters]
    by_position = algo.cls("MlpPolicy", SpaceEnv(), 1e-3, 32, 16, 3, 0.9, 0.8, 0.1)
    assert (by_position.learning_rate, by_position.n_steps, by_position.batch_size) == (1e-3, 32, 16)
    assert (by_position.n_epochs, by_position.gamma, by_position.gae_lambda) == (3, 0.9, 0.8)
    assert by_position.clip_range(1.0) == 0.1
    # All of PPO's arguments in its order, up to the private one that load() uses
    model, reference = algo.cls("MlpPolicy", SpaceEnv(), *defaults), PPO("MlpPolicy", SpaceEnv(), *defaults)
    for parameter in parameters:
        if parameter.name not in ("_init_setup_model", "clip_range", "device"):
            name = "_stats_window_size" if parameter.name == "stats_window_size" else parameter.name
            assert getattr(model, name) == getattr(reference, name), name


def test_rollouts_end_when_enough_steps_are_done(algo: Algorithm) -> None:
    model = algo.make(DummyVecEnv(copies(SpaceEnv, 3)))
    model.learn(50)  # one rollout has 16 * 3 = 48 steps
    assert model.num_timesteps == 96
    assert model._n_updates == 2 * model.n_epochs
    model.learn(48, reset_num_timesteps=False)
    assert model.num_timesteps == 144
    assert model.learn(1).num_timesteps == 48


def test_progress(algo: Algorithm) -> None:
    model = algo.make(SpaceEnv())
    model.learn(64)
    assert model._current_progress_remaining == 0
    model.learn(20)  # overshoots: 32 of 20 steps
    assert model._current_progress_remaining == pytest.approx(1 - 32 / 20)


def test_schedules(algo: Algorithm) -> None:
    model = algo.make(
        SpaceEnv(),
        learning_rate=lambda progress: 1e-3 * progress,
        clip_range=lambda progress: 0.1 + 0.2 * progress,
        clip_range_vf=lambda progress: 1 + progress,
    )
    rows = record_log(model)
    model.learn(64)
    # Trained after 16, 32, 48 and 64 of 64 steps; each row is written with the values of the update before it.
    expected = {
        "train/learning_rate": [7.5e-4, 5e-4, 2.5e-4],
        "train/clip_range": [0.25, 0.2, 0.15],
        "train/clip_range_vf": [1.75, 1.5, 1.25],
    }
    for key, values in expected.items():
        assert [row[key] for _, row in rows if key in row] == pytest.approx(values), key
    assert model.policy.optimizer.param_groups[0]["lr"] == 0


def test_learning_rate_zero_changes_nothing(algo: Algorithm) -> None:
    model = algo.make(SpaceEnv(), **algo.no_learning())
    before = copy_parameters(model)
    model.learn(32)
    assert unchanged(model, before) == list(before)


def test_schedules_below_zero(algo: Algorithm) -> None:
    def linear(progress: float) -> float:
        return 0.1 * progress

    # The last update comes after 48 of 33 steps, where the schedule has become negative.
    model = algo.make(SpaceEnv(), clip_range=linear).learn(33)
    assert model._current_progress_remaining < 0
    assert all(th.isfinite(parameter).all() for parameter in model.policy.parameters())


def test_target_kl_stops_early(algo: Algorithm, capsys: pytest.CaptureFixture[str]) -> None:
    kwargs: dict[str, Any] = {"learning_rate": 0.05, "n_epochs": 8, "verbose": 1}
    free = algo.make(SpaceEnv(), **kwargs)
    free.learn(16)
    assert free._n_updates == 8
    assert "Early stopping" not in capsys.readouterr().out
    stopped = algo.make(SpaceEnv(), target_kl=1e-3, **kwargs)
    stopped.learn(16)
    # The first minibatch still has the behaviour policy, so something is learned.
    assert 1 <= stopped._n_updates < 8
    assert "Early stopping at" in capsys.readouterr().out
    assert stopped.policy.optimizer.state


def test_rollout_of_one_step_without_normalisation(algo: Algorithm) -> None:
    kwargs = {"normalize_advantage": False, **algo.normalizing_as_ppo()}
    model = algo.make(SpaceEnv(), n_steps=1, batch_size=1, **kwargs)
    before = copy_parameters(model)
    model.learn(4)
    assert model.num_timesteps == 4
    assert_trained(model, before)


def test_truncated_minibatch_of_one(algo: Algorithm) -> None:
    with pytest.warns(UserWarning, match="truncated mini-batch of size 1"):
        model = algo.make(SpaceEnv(), n_steps=16, batch_size=15)
    before = copy_parameters(model)
    rows = record_log(model)
    model.learn(32)
    assert_trained(model, before)
    assert np.isfinite(rows[-1][1]["train/loss"])


def test_gpu_is_not_recommended_for_mlp(algo: Algorithm) -> None:
    model = algo.make(SpaceEnv())
    model.device = th.device("cuda")
    with pytest.warns(UserWarning, match=f"trying to run {algo.cls.__name__} on the GPU"):
        model._maybe_recommend_cpu()


def test_environment_is_given_in_every_form(algo: Algorithm) -> None:
    for env in ("CartPole-v1", gym.make("CartPole-v1"), DummyVecEnv([lambda: gym.make("CartPole-v1")])):
        model = algo.cls("MlpPolicy", env, n_steps=16, batch_size=16, n_epochs=1, device="cpu", **algo.kwargs)
        assert model.learn(16).num_timesteps == 16


def test_set_up_later(algo: Algorithm) -> None:
    model = algo.make(SpaceEnv(), _init_setup_model=False)
    assert not hasattr(model, "policy")
    model._setup_model()
    reference = algo.make(SpaceEnv())
    assert_same(dict(model.policy.state_dict()), dict(reference.policy.state_dict()))
    assert model.learn(16).num_timesteps == 16


def test_verbose(algo: Algorithm, capsys: pytest.CaptureFixture[str]) -> None:
    algo.make(gym.wrappers.TimeLimit(SpaceEnv(), 8), verbose=0).learn(32)
    assert capsys.readouterr().out == ""
    algo.make(gym.wrappers.TimeLimit(SpaceEnv(), 8), verbose=1).learn(32)
    out = capsys.readouterr().out
    assert "Using cpu device" in out
    assert "policy_gradient_loss" in out


def test_evaluation_of_model_and_policy(algo: Algorithm) -> None:
    env = gym.wrappers.TimeLimit(SpaceEnv(action_space="box", reward=1.0), 8)
    model = algo.make(env).learn(16)
    for agent in (model, model.policy):
        rewards, lengths = evaluate_policy(agent, model.get_env(), n_eval_episodes=3, return_episode_rewards=True)
        assert rewards == [8, 8, 8]
        assert lengths == [8, 8, 8]
    with pytest.raises(AssertionError, match="below threshold"):
        evaluate_policy(model, model.get_env(), n_eval_episodes=1, reward_threshold=9)


def test_two_models_do_not_share_state(algo: Algorithm) -> None:
    first, second = algo.make(box_env()), algo.make(box_env())
    before = copy_parameters(second)
    first.learn(32)
    assert unchanged(second, before) == list(before)
