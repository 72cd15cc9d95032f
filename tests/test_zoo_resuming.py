"""``--checkpoint-every`` and ``--resume`` of the zoo's ``train``."""

import json
import os
import pickle
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium.envs.classic_control import PendulumEnv

from sb3_ppo_ewma import PPOEWMA
from sb3_ppo_ewma.callbacks.run_checkpoint import RunCheckpoint
from sb3_ppo_ewma.zoo.command_line import main

pytestmark = pytest.mark.long
COMMAND = ["train", "--algo", "ppo_ewma", "--env", "Pendulum-v1", "--seed", "3", "-n", "300", "--eval-freq", "100"]
COMMAND += ["--eval-episodes", "1", "-params", "n_envs:2", "n_steps:32", "batch_size:32", "n_epochs:1"]
OPTIONS = ["--resume", "--checkpoint-every", "70"]


class CrashError(Exception):
    pass


def crash_after(n_files: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let training raise an error after so many checkpoints."""
    original, written = RunCheckpoint._write, []

    def write(self: Any) -> None:
        original(self)
        written.append(1)
        if len(written) == n_files:
            raise CrashError

    monkeypatch.setattr(RunCheckpoint, "_write", write)


def train(folder: Path, *options: str) -> None:
    main([*COMMAND, "-f", str(folder), *options])


def parameters(folder: Path) -> list[th.Tensor]:
    model = PPOEWMA.load(folder / "ppo_ewma" / "Pendulum-v1_1" / "Pendulum-v1.zip")
    return [*model.policy.state_dict().values()]


def test_goes_on_after_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    train(tmp_path / "whole")
    with monkeypatch.context() as patch:
        crash_after(2, patch)
        with pytest.raises(CrashError):
            train(tmp_path / "cut", *OPTIONS)
    run = tmp_path / "cut" / "ppo_ewma" / "Pendulum-v1_1"
    assert not (run / "Pendulum-v1.zip").exists()
    train(tmp_path / "cut", *OPTIONS)
    assert f"Resuming from {run / 'checkpoints' / 'checkpoint_140_steps.zip'}" in capsys.readouterr().out
    pairs = zip(parameters(tmp_path / "whole"), parameters(tmp_path / "cut"), strict=True)
    assert all(th.equal(first, second) for first, second in pairs)
    files = [tmp_path / each / "ppo_ewma" / "Pendulum-v1_1" for each in ("whole", "cut")]
    first, second = (np.load(file / "evaluations.npz") for file in files)
    assert first["timesteps"].tolist() == second["timesteps"].tolist()
    np.testing.assert_array_equal(first["results"], second["results"])
    episodes = [(file / "0.monitor.csv").read_text().splitlines()[2:] for file in files]
    assert [line.split(",")[:2] for line in episodes[0]] == [line.split(",")[:2] for line in episodes[1]]


def test_begins_again_in_the_same_folder_without_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(self: Any) -> None:
        raise CrashError

    with monkeypatch.context() as patch:
        patch.setattr(RunCheckpoint, "_write", crash)
        with pytest.raises(CrashError):
            train(tmp_path, *OPTIONS)
    train(tmp_path, *OPTIONS)
    assert [path.name for path in (tmp_path / "ppo_ewma").iterdir()] == ["Pendulum-v1_1"]


def test_goes_on_with_its_normalization(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [*OPTIONS, "-params", "normalize:true"]
    with monkeypatch.context() as patch:
        crash_after(2, patch)
        with pytest.raises(CrashError):
            train(tmp_path, *command)
    train(tmp_path, *command)
    with (tmp_path / "ppo_ewma" / "Pendulum-v1_1" / "Pendulum-v1" / "vecnormalize.pkl").open("rb") as file:
        count = pickle.load(file).obs_rms.count
    assert 300 <= count < 400  # not only those after the crash


def test_a_complete_run_is_left_alone(tmp_path: Path, capsys: Any) -> None:
    train(tmp_path, *OPTIONS)
    with pytest.raises(SystemExit) as end:
        train(tmp_path, "--resume")  # how often it saves does not matter
    assert end.value.code == 0
    assert "is complete" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "ppo_ewma").iterdir()] == ["Pendulum-v1_1"]


def test_another_command_begins_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    with monkeypatch.context() as patch:
        crash_after(1, patch)
        with pytest.raises(CrashError):
            train(tmp_path, *OPTIONS)
    train(tmp_path, *OPTIONS, "--env-kwargs", "g:9.0")
    assert "Resuming" not in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "ppo_ewma").iterdir()) == ["Pendulum-v1_1", "Pendulum-v1_2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--checkpoint-every", "0"], "--checkpoint-every must be >= 1"),
        (["--resume", "-optimize"], "not for -optimize"),
        (["--resume", "--algo", "ppo"], "are for ppo_ewma"),
    ],
)
def test_what_cannot_be_is_refused(options: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=message):
        train(tmp_path, *options)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_run(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    train(tmp_path / "whole")
    original, steps = PendulumEnv.step, []

    def step(env: Any, action: Any) -> Any:
        steps.append(1)
        if len(steps) == 101:  # the first environment, in the middle of a rollout
            os.kill(os.getpid(), number)
        return original(env, action)

    before = signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    with monkeypatch.context() as patch:
        patch.setattr(PendulumEnv, "step", step)
        with pytest.raises(SystemExit) as end:
            train(tmp_path / "cut", "--resume")
    signal.signal(number, before)
    assert end.value.code == 128 + number
    run = tmp_path / "cut" / "ppo_ewma" / "Pendulum-v1_1"
    saved = [path.name for path in (run / "checkpoints").glob("*.zip")]
    assert len(saved) == 1
    assert saved[0] not in ("checkpoint_64_steps.zip", "checkpoint_128_steps.zip")
    assert (run / "Pendulum-v1.zip").exists()
    assert not json.loads((run / "checkpoints" / "run.json").read_text())["is_complete"]
    train(tmp_path / "cut", "--resume")
    assert f"Resuming from {run / 'checkpoints' / saved[0]}" in capsys.readouterr().out
    pairs = zip(parameters(tmp_path / "whole"), parameters(tmp_path / "cut"), strict=True)
    assert all(th.equal(first, second) for first, second in pairs)
