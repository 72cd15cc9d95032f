"""Ctrl-C, SIGTERM and SIGHUP: the agent is saved, the exit code tells the signal, nothing is left."""

import multiprocessing
import os
import random
import signal
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import optuna
import pytest
from optuna.trial import TrialState

from benchmarks.faults import interruptions
from sb3_ppo_ewma import zoo
from sb3_ppo_ewma.zoo.signals import Stopped, StopSignals, stop_signals

pytestmark = pytest.mark.long

zoo.register()
ENDING = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(autouse=True)
def default_handlers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Those of a program that was just started."""
    monkeypatch.chdir(tmp_path)
    defaults = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    previous = {number: signal.signal(number, handler) for number, handler in defaults.items()}
    yield
    for number, handler in previous.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def exit_code(act: Callable[[StopSignals], Any]) -> Any:
    with pytest.raises(SystemExit) as error:
        run(act)
    return error.value.code


def run(act: Callable[[StopSignals], Any]) -> None:
    with stop_signals("program") as stop:
        act(stop)


# === Signals ===


@pytest.mark.parametrize("number", ENDING)
def test_exit_code_tells_the_signal(number: int, capfd: pytest.CaptureFixture[str]) -> None:
    assert exit_code(lambda stop: send(number)) == 128 + number
    assert f"program: ended by {signal.Signals(number).name}" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_signals_that_are_ignored_or_handled_stay_so() -> None:
    received = []
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    signal.signal(signal.SIGTERM, lambda *_: received.append(1))
    run(lambda stop: (send(signal.SIGHUP), send(signal.SIGTERM)))
    assert received == [1]


def test_without_a_signal_errors_and_exit_codes_stay() -> None:
    def fail(error: BaseException) -> Any:
        raise error

    for error in (EOFError("why"), KeyboardInterrupt(), SystemExit(3)):
        with pytest.raises(type(error)) as raised:
            run(lambda stop, error=error: fail(error))  # type: ignore[misc]
        assert raised.value is error


def test_an_error_that_the_signal_caused_comes_before_it() -> None:
    def act(stop: StopSignals) -> None:
        threading.Timer(0.2, send, [signal.SIGTERM]).start()
        raise BrokenPipeError  # of a process that the signal has ended

    assert exit_code(act) == 143


def test_only_the_first_signal_is_raised_once(capfd: pytest.CaptureFixture[str]) -> None:
    def act(stop: StopSignals) -> None:
        with pytest.raises(Stopped, match="SIGINT"), stop.once():
            send(signal.SIGINT)
        send(signal.SIGTERM)
        assert "program: SIGTERM waits until the agent is saved" in capfd.readouterr().err
        stop.release()
        send(signal.SIGTERM)

    assert exit_code(act) == 130


def test_signals_can_wait(capfd: pytest.CaptureFixture[str]) -> None:
    done = []

    def act(stop: StopSignals) -> None:
        with stop.waiting("the checkpoint is written"):
            send(signal.SIGTERM)
            done.append("written")
        done.append("gone on")

    assert exit_code(act) == 143
    assert done == ["written"]
    assert "program: SIGTERM waits until the checkpoint is written" in capfd.readouterr().err


def sleep(writes: int) -> None:
    os.write(writes, b"1")
    time.sleep(20)


def test_processes_that_are_forked_act_by_default() -> None:
    def act(stop: StopSignals) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            reads, writes = os.pipe()
            process: Any = multiprocessing.get_context("fork").Process(target=sleep, args=(writes,))
            process.start()
            os.read(reads, 1)
            os.kill(process.pid, number)
            process.join()
            assert process.exitcode == (-number if number == signal.SIGTERM else 1)

    run(act)


# === Trainings and searches in this process ===

TRAIN = ["train", "--algo", "ppo_ewma", "--device", "cpu", "--seed", "0", "-f", "logs", "--eval-freq", "-1"]
SMALL = ["-params", "n_envs:1", "n_steps:16", "batch_size:16", "n_epochs:1"]
RUN = Path("logs/ppo_ewma")


class Fails(gym.Wrapper[Any, Any, Any, Any]):
    """Does something at a step, and can fail when it is closed."""

    at_step: Callable[[], None] = staticmethod(lambda: None)  # type: ignore[assignment]
    closes = True
    n_steps = 0

    def step(self, action: Any) -> Any:
        self.n_steps += 1
        if self.n_steps == 40:
            type(self).at_step()
        return super().step(action)

    def close(self) -> None:
        super().close()
        if not self.closes:
            raise BrokenPipeError("closing fails")


@pytest.fixture
def env_id(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    gym.register("Fails-v0", entry_point=lambda **_: Fails(gym.make("CartPole-v1")), max_episode_steps=100)
    yield "Fails-v0"
    Fails.at_step, Fails.closes = staticmethod(lambda: None), True  # type: ignore[assignment]
    del gym.registry["Fails-v0"]


def agents() -> list[str]:
    """:return: names of agents that are there as a whole"""
    return [each.name for each in RUN.rglob("*.zip") if zipfile.ZipFile(each).testzip() is None]


def train(env_id: str, *arguments: str) -> Any:
    """:return: exit code"""
    try:
        zoo.main([*TRAIN, "--env", env_id, *arguments, *SMALL])
    except SystemExit as error:
        return error.code
    return 0


def test_an_agent_is_saved_although_its_environments_cannot_be_closed(
    env_id: str, capfd: pytest.CaptureFixture[str]
) -> None:
    Fails.closes = False
    assert train(env_id, "-n", "64") == 0
    assert agents() == ["Fails-v0.zip"]
    assert "closing fails" in capfd.readouterr().err


@pytest.mark.parametrize("number", ENDING)
def test_a_signal_saves_the_agent(number: int, env_id: str) -> None:
    Fails.closes = False
    Fails.at_step = staticmethod(lambda: send(number))  # type: ignore[assignment]
    assert train(env_id, "-n", "100000000") == 128 + number
    assert agents() == ["Fails-v0.zip"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_whose_error_is_lost_ends_training_too(env_id: str) -> None:
    class Loses:
        def __del__(self) -> None:
            send(signal.SIGTERM)

    Fails.at_step = Loses  # type: ignore[assignment]
    assert train(env_id, "-n", "100000000") == 143
    assert agents() == ["Fails-v0.zip"]


def test_an_error_of_training_is_an_error(env_id: str) -> None:
    def fail() -> None:
        raise ZeroDivisionError("why")

    Fails.at_step = staticmethod(fail)  # type: ignore[assignment]
    with pytest.raises(ZeroDivisionError, match="why"):
        train(env_id, "-n", "100000000")
    assert agents() == []


def test_a_signal_while_the_agent_is_saved(
    env_id: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fsync = os.fsync

    def interrupted(descriptor: int) -> None:
        send(signal.SIGINT)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", interrupted)
    assert train(env_id, "-n", "64") == 130
    assert agents() == ["Fails-v0.zip"]
    assert "SIGINT waits until the agent is saved" in capfd.readouterr().err


@pytest.mark.parametrize("cls", [OSError, RuntimeError])  # Python's and torch's on a full disk
def test_an_agent_that_cannot_be_saved_is_an_error(
    cls: type[Exception], env_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise cls("No space left on device")

    monkeypatch.setenv("SB3_PPO_EWMA_TRACEBACK", "1")
    monkeypatch.setattr(os, "fsync", full)
    Fails.at_step = staticmethod(lambda: send(signal.SIGTERM))  # type: ignore[assignment]
    with pytest.raises(cls, match="No space left"):
        train(env_id, "-n", "100000000")


def test_a_signal_before_training_leaves_no_folder(env_id: str) -> None:
    made = gym.registry[env_id].entry_point

    def make(**kwargs: Any) -> Any:
        send(signal.SIGTERM)
        return made(**kwargs)  # type: ignore[operator]

    gym.registry[env_id].entry_point = make
    assert train(env_id, "-n", "64") == 143
    assert list(Path("logs").glob("*/*")) == []


SEARCH = ["-optimize", "--no-optim-plots", "--n-evaluations", "1", "--eval-episodes", "1", "-n", "100000000"]


@pytest.mark.parametrize(
    ("number", "states"),
    [(signal.SIGINT, [TrialState.FAIL]), (signal.SIGTERM, [TrialState.FAIL, TrialState.WAITING])],
)
def test_a_signal_ends_a_search(number: int, states: list[TrialState], env_id: str) -> None:
    Fails.at_step = staticmethod(lambda: send(number))  # type: ignore[assignment]
    storage = ["--storage", "study.log", "--study-name", "study"]
    assert train(env_id, *SEARCH, *storage, "--n-trials", "3") == 128 + number
    journal = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend("study.log"))
    trials = optuna.load_study(storage=journal, study_name="study").trials
    assert [trial.state for trial in trials] == states  # the machine's signal, not the user's, lets it be tried again


def test_a_signal_ends_a_search_in_several_threads(env_id: str) -> None:
    Fails.at_step = staticmethod(lambda: send(signal.SIGINT))  # type: ignore[assignment]
    assert train(env_id, *SEARCH, "--n-trials", "4", "--n-jobs", "2") == 130


def test_trials_of_processes_that_ended_do_not_count(env_id: str) -> None:
    def begin() -> None:
        from sb3_ppo_ewma.zoo import dead_trials

        dead_trials.mark(
            optuna.create_study(storage="sqlite:///study.db", study_name="study", direction="maximize").ask()
        )

    process = multiprocessing.get_context("fork").Process(target=begin)
    process.start()
    process.join()
    assert process.exitcode == 0
    arguments = [
        *SEARCH[:-1],
        "64",
        "--storage",
        "sqlite:///study.db",
        "--study-name",
        "study",
        "--max-total-trials",
        "1",
    ]
    gym.registry[env_id].entry_point = lambda **_: gym.make("CartPole-v1")
    assert train(env_id, *arguments) == 0
    states = [trial.state for trial in optuna.load_study(storage="sqlite:///study.db", study_name="study").trials]
    assert states == [TrialState.FAIL, TrialState.COMPLETE]


# === Processes ===


@pytest.mark.parametrize(
    ("mode", "how", "moment"),
    [
        ("subproc", "Ctrl-C", "training"),
        ("subproc", "SIGTERM to the group", "training"),
        ("asynchronous", "Ctrl-C", "training"),
        ("asynchronous", "kill -9", "training"),
        ("asynchronous, subproc", "Ctrl-C twice", "training"),
        ("asynchronous, envpool", "SIGHUP", "training"),
        ("plain", "Ctrl-C, output gone", "training"),
        ("statistics", "SIGTERM", "saving"),
    ],
)
def test_processes(mode: str, how: str, moment: str, tmp_path: Path) -> None:
    if "envpool" in mode:
        pytest.importorskip("envpool")
    result = interruptions.outcome(mode, how, moment, tmp_path / "trial", random.Random(0))
    assert result.verdict == "recovered", result.detail


@pytest.mark.slow
@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM"])
def test_torchrun(how: str, tmp_path: Path) -> None:
    result = interruptions.torchrun(how, tmp_path / "trial", random.Random(0))
    assert result.verdict == "recovered", result.detail
