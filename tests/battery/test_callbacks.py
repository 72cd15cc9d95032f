"""
Callbacks.
"""

import pathlib
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    ConvertCallback,
    EvalCallback,
    EveryNTimesteps,
    LogEveryNTimesteps,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from tests.battery.algorithms import Algorithm
from tests.battery.envs import SpaceEnv, copies
from tests.battery.helpers import assert_trained, copy_parameters, record_log, unchanged


def constant_env() -> gym.Env[Any, Any]:
    """:return: episodes of 8 steps with a reward of 1 each"""
    return Monitor(SpaceEnv(reward=1.0))


class Recorder(BaseCallback):
    """
    Writes down which of its methods were called at which step.

    :param result: of every step
    """

    def __init__(self, result: Any = True) -> None:
        super().__init__()
        self.events: list[tuple[str, int]] = []
        self.result = result

    def _on_training_start(self) -> None:
        self.events.append(("training_start", self.num_timesteps))

    def _on_rollout_start(self) -> None:
        self.events.append(("rollout_start", self.model.num_timesteps))

    def _on_step(self) -> bool:
        assert {"new_obs", "rewards", "dones", "infos", "actions", "values", "log_probs"} <= set(self.locals)
        self.events.append(("step", self.num_timesteps))
        return self.result

    def _on_rollout_end(self) -> None:
        self.events.append(("rollout_end", self.num_timesteps))

    def _on_training_end(self) -> None:
        self.events.append(("training_end", self.num_timesteps))


def test_every_event(algo: Algorithm) -> None:
    recorder = Recorder()
    algo.make(SpaceEnv(), n_steps=2, batch_size=2).learn(4, callback=recorder)
    rollout = [("step", 1), ("step", 2), ("rollout_end", 2)]
    later = [("step", 3), ("step", 4), ("rollout_end", 4)]
    assert recorder.events == [
        ("training_start", 0),
        ("rollout_start", 0),
        *rollout,
        ("rollout_start", 2),
        *later,
        ("training_end", 4),
    ]


@pytest.mark.parametrize("result", [False, np.bool_(False), th.tensor(False)], ids=["bool", "numpy", "torch"])
def test_a_callback_ends_training(algo: Algorithm, result: Any) -> None:
    recorder = Recorder(result)
    model = algo.make(SpaceEnv())
    before = copy_parameters(model)
    model.learn(64, callback=recorder)
    assert model.num_timesteps == 1
    assert recorder.events[-1] == ("training_end", 1)
    assert unchanged(model, before) == list(before)  # an incomplete rollout is not trained on
    assert model.learn(16).num_timesteps == 16


def test_functions_and_lists(algo: Algorithm) -> None:
    seen = []

    def function(locals_: dict[str, Any], globals_: dict[str, Any]) -> bool:
        seen.append(locals_["self"].num_timesteps)
        return len(seen) < 20

    model = algo.make(SpaceEnv())
    model.learn(64, callback=function)
    assert seen == list(range(1, 21))
    first, second = Recorder(), Recorder()
    model.learn(16, callback=[first, CallbackList([second, ConvertCallback(None)])])
    assert first.events == second.events
    assert first.locals["new_obs"] is second.locals["new_obs"]


def test_evaluation_with_nested_callbacks(algo: Algorithm, tmp_path: pathlib.Path) -> None:
    class Child(BaseCallback):
        def _on_step(self) -> bool:
            assert isinstance(self.parent, EvalCallback)
            assert self.parent.last_mean_reward == 8
            return True

    best, after = Child(), Child()
    evaluation = EvalCallback(
        constant_env(),
        callback_on_new_best=CallbackList([best]),
        callback_after_eval=CallbackList([after]),
        n_eval_episodes=2,
        eval_freq=8,
        log_path=str(tmp_path),
        best_model_save_path=str(tmp_path),
        verbose=0,
    )
    model = algo.make(constant_env())
    model.learn(32, callback=evaluation)
    # Evaluations after 8, 16, 24 and 32 steps, all with the same reward: only the first one is a new best.
    assert (best.n_calls, after.n_calls) == (1, 4)
    results = np.load(tmp_path / "evaluations.npz")
    assert results["timesteps"].tolist() == [8, 16, 24, 32]
    assert results["results"].tolist() == [[8, 8]] * 4
    assert results["ep_lengths"].tolist() == [[8, 8]] * 4
    saved = algo.cls.load(tmp_path / "best_model", device="cpu")
    assert saved.num_timesteps == 8
    assert saved.predict(np.zeros(3, np.float32))[0].shape == ()


def test_training_stops_at_a_reward(algo: Algorithm) -> None:
    for threshold, steps in ((8, 8), (8.5, 32)):
        stop = StopTrainingOnRewardThreshold(reward_threshold=threshold)
        evaluation = EvalCallback(constant_env(), callback_on_new_best=stop, eval_freq=8, verbose=0)
        assert algo.make(constant_env()).learn(32, callback=evaluation).num_timesteps == steps


def test_training_stops_without_improvement(algo: Algorithm) -> None:
    stop = StopTrainingOnNoModelImprovement(max_no_improvement_evals=2, min_evals=1)
    evaluation = EvalCallback(constant_env(), callback_after_eval=stop, eval_freq=4, verbose=0)
    # The first evaluation is the best; the second, third and fourth bring nothing new: one more than is allowed.
    assert algo.make(constant_env()).learn(64, callback=evaluation).num_timesteps == 16


def test_training_stops_after_episodes(algo: Algorithm) -> None:
    model = algo.make(DummyVecEnv(copies(constant_env, 2)), n_steps=32)
    stop = StopTrainingOnMaxEpisodes(max_episodes=2)
    # Two episodes of 8 steps in each of the two environments
    assert model.learn(1000, callback=stop).num_timesteps == 32
    assert stop.n_episodes == 4


def test_evaluation_logs_success_and_step(algo: Algorithm, tmp_path: pathlib.Path) -> None:
    evaluation = EvalCallback(
        DummyVecEnv(copies(lambda: Monitor(BitFlippingEnv(n_bits=2)), 2)),
        eval_freq=5,
        log_path=str(tmp_path),
        verbose=0,
    )
    model = algo.make(BitFlippingEnv(n_bits=2))
    rows = record_log(model)
    model.learn(16, callback=evaluation)
    assert [step for step, row in rows if "eval/mean_reward" in row] == [5, 10, 15]
    assert all("eval/success_rate" in row for _, row in rows if "eval/mean_reward" in row)
    assert np.load(tmp_path / "evaluations.npz")["successes"].shape == (3, 5)


def test_evaluation_synchronises_normalisation(algo: Algorithm) -> None:
    train_env = VecNormalize(DummyVecEnv([SpaceEnv]))
    eval_env = VecNormalize(DummyVecEnv([SpaceEnv]), training=False, norm_reward=False)
    model = algo.make(train_env)
    model.learn(16, callback=EvalCallback(eval_env, eval_freq=16, verbose=0, warn=False))
    assert train_env.obs_rms.count > 16
    assert np.array_equal(train_env.obs_rms.mean, eval_env.obs_rms.mean)
    with pytest.warns(UserWarning, match="not of the same type"), pytest.raises(AssertionError, match="wrapped"):
        model.learn(16, callback=EvalCallback(constant_env(), eval_freq=16, verbose=0))


def test_checkpoints(algo: Algorithm, tmp_path: pathlib.Path) -> None:
    env = VecNormalize(DummyVecEnv([SpaceEnv]))
    checkpoint = CheckpointCallback(12, str(tmp_path), save_replay_buffer=True, save_vecnormalize=True, verbose=2)
    model = algo.make(env)
    model.learn(32, callback=checkpoint)
    names = {f"rl_model_{step}_steps.zip" for step in (12, 24)}
    names |= {f"rl_model_vecnormalize_{step}_steps.pkl" for step in (12, 24)}
    if algo.has_phases:
        names |= {f"rl_model_replay_buffer_{step}_steps.pkl" for step in (12, 24)}
    assert {path.name for path in tmp_path.iterdir()} == names
    restored_env = VecNormalize.load(str(tmp_path / "rl_model_vecnormalize_24_steps.pkl"), DummyVecEnv([SpaceEnv]))
    assert restored_env.obs_rms.count == pytest.approx(25, abs=0.01)  # with the first observation
    restored = algo.cls.load(tmp_path / "rl_model_24_steps", env=restored_env, device="cpu")
    assert restored.num_timesteps == 24
    # The unfinished rollout of a checkpoint is lost: a new one begins.
    assert restored.learn(16, reset_num_timesteps=False).num_timesteps == 40


def test_checkpoints_with_waiting_rollouts(own_algo: Algorithm, tmp_path: pathlib.Path) -> None:
    checkpoint = CheckpointCallback(24, str(tmp_path), save_replay_buffer=True)
    own_algo.make(SpaceEnv(), staleness=1).learn(32, callback=checkpoint)
    assert (tmp_path / "rl_model_replay_buffer_24_steps.pkl").exists()
    model = own_algo.cls.load(tmp_path / "rl_model_24_steps", env=SpaceEnv(), device="cpu")
    model.load_replay_buffer(tmp_path / "rl_model_replay_buffer_24_steps.pkl", truncate_last_traj=False)
    before = copy_parameters(model)
    model.learn(16, reset_num_timesteps=False)  # trains at once, on the rollout that was waiting
    assert_trained(model, before, phase=False)


def test_checkpoints_within_a_phase(phasic_algo: Algorithm, tmp_path: pathlib.Path) -> None:
    checkpoint = CheckpointCallback(24, str(tmp_path), save_replay_buffer=True)
    phasic_algo.make(SpaceEnv()).learn(32, callback=checkpoint)
    model = phasic_algo.cls.load(tmp_path / "rl_model_24_steps", env=SpaceEnv(), device="cpu")
    model.load_replay_buffer(tmp_path / "rl_model_replay_buffer_24_steps.pkl", truncate_last_traj=False)
    before = copy_parameters(model)
    model.learn(16, reset_num_timesteps=False)  # the second rollout of the phase
    assert_trained(model, before)


def test_events_every_n_steps(algo: Algorithm, tmp_path: pathlib.Path) -> None:
    model = algo.make(SpaceEnv())
    rows = record_log(model)
    on_event = EveryNTimesteps(10, CheckpointCallback(1, str(tmp_path), name_prefix="event"))
    model.learn(32, callback=[on_event, LogEveryNTimesteps(12)], log_interval=100)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"event_{step}_steps.zip" for step in (10, 20, 30)]
    assert [step for step, _ in rows] == [12, 24]
    # Steps are counted per environment step: with three environments, events come at the first step at or after.
    model = algo.make(DummyVecEnv(copies(SpaceEnv, 3)), n_steps=8)
    rows = record_log(model)
    model.learn(24, callback=LogEveryNTimesteps(10), log_interval=100)
    assert [step for step, _ in rows] == [12, 24]


@pytest.mark.filterwarnings("ignore:rich is experimental")
def test_progress_bar(algo: Algorithm, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    pytest.importorskip("tqdm")
    recorder = Recorder()
    model = algo.make(SpaceEnv()).learn(32, callback=recorder, progress_bar=True)
    assert model.num_timesteps == 32
    assert recorder.events[-1] == ("training_end", 32)
    output = capsys.readouterr()
    assert "32/32" in output.out + output.err
