"""
Logs: what is written, where, how often.
"""

import csv
import json
import pathlib
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import (
    CSVOutputFormat,
    HParam,
    HumanOutputFormat,
    TensorBoardOutputFormat,
    configure,
)
from stable_baselines3.common.monitor import Monitor

from tests.battery.algorithms import Algorithm
from tests.battery.envs import SpaceEnv, box_env
from tests.battery.helpers import record_log


def monitored() -> gym.Env[Any, Any]:
    """:return: episodes of 8 steps"""
    return Monitor(SpaceEnv())


def test_everything_ppo_logs(algo: Algorithm) -> None:
    control = Algorithm(PPO)
    for make in (monitored, box_env):
        kwargs = {"clip_range_vf": 0.2, "target_kl": 1.0}
        model, reference = algo.make(make(), **kwargs), control.make(make(), **kwargs)
        rows, reference_rows = record_log(model), record_log(reference)
        model.learn(48)
        reference.learn(48)
        assert [step for step, _ in rows] == [step for step, _ in reference_rows]
        for (_, row), (_, reference_row) in zip(rows, reference_rows, strict=True):
            assert set(reference_row) <= set(row)
            assert all(np.isfinite(value) for value in row.values())
        assert "train/policy_gradient_loss" in reference_rows[-1][1]


def test_counters(algo: Algorithm) -> None:
    model = algo.make(monitored())
    rows = record_log(model)
    model.learn(64)
    # The first row comes before the first update; an update is n_epochs epochs.
    assert [row["time/iterations"] for _, row in rows] == [1, 2, 3, 4]
    assert [row["time/total_timesteps"] for _, row in rows] == [16, 32, 48, 64]
    assert [row.get("train/n_updates") for _, row in rows] == [None, 2, 4, 6]
    assert [row["rollout/ep_len_mean"] for _, row in rows] == [8] * 4
    model.learn(32, reset_num_timesteps=False)
    assert [row["time/total_timesteps"] for _, row in rows[4:]] == [80, 96]
    assert [row["train/n_updates"] for _, row in rows[4:]] == [8, 10]


@pytest.mark.parametrize(("log_interval", "steps"), [(1, [16, 32, 48, 64]), (2, [32, 64]), (None, [])])
def test_log_interval(algo: Algorithm, log_interval: Any, steps: list[int]) -> None:
    model = algo.make(monitored())
    rows = record_log(model)
    model.learn(64, log_interval=log_interval)
    assert [step for step, _ in rows] == steps


def test_outputs_by_default(algo: Algorithm, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert algo.make(monitored()).learn(16).logger.output_formats == []
    (human,) = algo.make(monitored(), verbose=1).learn(16).logger.output_formats
    assert isinstance(human, HumanOutputFormat)
    monkeypatch.setenv("SB3_LOGDIR", str(tmp_path / "logs"))
    assert algo.make(monitored()).learn(16).logger.dir == str(tmp_path / "logs")


def test_csv_and_json(algo: Algorithm, tmp_path: pathlib.Path) -> None:
    logger = configure(str(tmp_path), ["csv", "json", "log"])
    model = algo.make(monitored())
    model.set_logger(logger)
    model.learn(48)
    assert model.logger is logger  # not overwritten by learn()
    assert isinstance(logger.output_formats[0], CSVOutputFormat)
    with (tmp_path / "progress.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["time/total_timesteps"] for row in table] == ["16", "32", "48"]
    rows = [json.loads(line) for line in (tmp_path / "progress.json").read_text().splitlines()]
    assert [row["time/total_timesteps"] for row in rows] == [16, 32, 48]
    assert [row["train/loss"] for row in rows[1:]] == pytest.approx([float(row["train/loss"]) for row in table[1:]])
    assert "clip_fraction" in (tmp_path / "log.txt").read_text()


class HyperparameterCallback(BaseCallback):
    """Writes hyper-parameters for tensorboard."""

    def _on_training_start(self) -> None:
        hyperparameters = {"algorithm": type(self.model).__name__, "learning rate": self.model.learning_rate}
        value = HParam(hyperparameters, {"train/value_loss": 0})
        self.logger.record("hparams", value, exclude=("stdout", "log", "json", "csv"))

    def _on_step(self) -> bool:
        return True


def test_tensorboard(algo: Algorithm, tmp_path: pathlib.Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    model = algo.make(monitored(), tensorboard_log=str(tmp_path))
    model.learn(32, callback=HyperparameterCallback())
    assert isinstance(model.logger.output_formats[0], TensorBoardOutputFormat)
    model.learn(16, reset_num_timesteps=False)  # goes on in the same folder
    model.learn(16)  # the next number
    model.learn(16, tb_log_name="other")
    name = algo.cls.__name__
    assert sorted(p.name for p in tmp_path.iterdir() if "other" not in p.name) == [f"{name}_1", f"{name}_2"]
    assert (tmp_path / "other_1").is_dir()
    # A run that goes on writes another file in the folder of the first: the accumulator reads them in turn.
    events = accumulator.EventAccumulator(str(tmp_path / f"{name}_1"))
    events.Reload()
    scalars = events.Tags()["scalars"]
    assert {"train/approx_kl", "train/clip_fraction", "train/value_loss", "rollout/ep_rew_mean"} <= set(scalars)
    assert [event.step for event in events.Scalars("time/fps")] == [16, 32, 48]


@pytest.mark.parametrize("window", [1, 3, 100])
def test_statistics_window(algo: Algorithm, window: int) -> None:
    env = monitored()
    model = algo.make(env, stats_window_size=window)
    rows = record_log(model)
    model.learn(48)
    rewards = env.get_episode_rewards()
    assert len(rewards) == 6
    assert rows[-1][1]["rollout/ep_rew_mean"] == pytest.approx(np.mean(rewards[-window:]), rel=1e-4)


class SuccessEnv(SpaceEnv):
    """Every second episode is a success."""

    episodes = 0

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        *rest, truncated, info = super().step(action)
        self.episodes += truncated
        return *rest, truncated, {"is_success": bool(self.episodes % 2)} if truncated else info


def test_success_rate(algo: Algorithm) -> None:
    model = algo.make(Monitor(SuccessEnv()))
    rows = record_log(model)
    model.learn(24 + 8)
    assert [row["rollout/success_rate"] for _, row in rows] == [0.5, 0.5]


def test_no_time_passes(algo: Algorithm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time_ns", lambda: 42)
    monkeypatch.setattr("time.time", lambda: 42.0)
    model = algo.make(monitored())
    rows = record_log(model)
    model.learn(32)
    assert all(row["time/fps"] >= 0 for _, row in rows)
