"""Journals of searches: locks of processes that were killed, lines cut short, files that are none, dead trials."""

import errno
import os
import pickle
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock, JournalFileSymlinkLock
from optuna.trial import TrialState

from benchmarks.faults import searches
from benchmarks.faults.outcome import GOOD
from sb3_ppo_ewma import zoo
from sb3_ppo_ewma.zoo import dead_trials, journal
from sb3_ppo_ewma.zoo.journal import JournalLock

pytestmark = pytest.mark.long

zoo.register()
FILE = "logs/study.log"


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("logs").mkdir()


def study_of(file: str = FILE) -> optuna.Study:
    storage = JournalStorage(JournalFileBackend(file))
    return optuna.create_study(storage=storage, study_name="study", direction="maximize", load_if_exists=True)


def in_process(act: Callable[[], Any]) -> int:
    """:return: id of a process that has ended after it"""
    child = os.fork()
    if child == 0:
        act()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    return child


# === Locks ===


def test_lock_of_a_killed_process_is_taken_over() -> None:
    study = study_of()
    in_process(JournalLock(FILE).acquire)
    assert set(os.listdir("logs")) == {"study.log", "study.log.lock"}
    began = time.monotonic()
    study.set_user_attr("a", 1)
    assert time.monotonic() - began < 5
    assert os.listdir("logs") == ["study.log"]
    assert study_of().user_attrs == {"a": 1}


@pytest.mark.parametrize("cls", [JournalFileSymlinkLock, JournalFileOpenLock])
def test_lock_of_another_program_is_taken_over_after_a_while(cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    study = study_of()
    in_process(cls(FILE).acquire)
    monkeypatch.setattr(journal, "_SECONDS_OF_GRACE", 0.3)
    study.set_user_attr("a", 1)
    assert os.listdir("logs") == ["study.log"]


def test_lock_of_another_machine_is_taken_over_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    study = study_of()
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(socket, "gethostname", lambda: "elsewhere")
        in_process(JournalLock(FILE).acquire)
    monkeypatch.setattr(journal, "_SECONDS_OF_GRACE", 0.3)
    study.set_user_attr("a", 1)
    assert os.listdir("logs") == ["study.log"]


@pytest.mark.parametrize("cls", [JournalLock, JournalFileSymlinkLock, JournalFileOpenLock])
def test_lock_of_a_living_process_is_waited_for(cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if cls is JournalLock:
        monkeypatch.setattr(journal, "_SECONDS_OF_GRACE", 0.1)  # which is only for those of unknown processes
    study, held = study_of(), cls(str(Path(FILE).absolute()))
    held.acquire()
    thread = threading.Thread(target=study.set_user_attr, args=("a", 1))
    thread.start()
    thread.join(0.5)
    assert thread.is_alive()
    held.release()
    thread.join()
    assert study_of().user_attrs == {"a": 1}
    assert os.listdir("logs") == ["study.log"]


def test_optunas_own_locks_wait_for_ours() -> None:
    study_of()
    held, others = JournalLock(FILE), JournalFileSymlinkLock(str(Path(FILE).absolute()))
    held.acquire()
    thread = threading.Thread(target=others.acquire)
    thread.start()
    thread.join(0.5)
    assert thread.is_alive()
    held.release()
    thread.join()
    others.release()


def test_a_lock_that_was_taken_over_is_not_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    lost, own = JournalLock(FILE), JournalLock(FILE)
    lost.acquire()
    os.unlink(f"{FILE}.lock")  # as another machine does, after a while
    own.acquire()
    lost.release()
    assert Path(f"{FILE}.lock").exists()
    own.release()
    assert os.listdir("logs") == []


def test_an_interrupt_while_the_lock_is_taken_gives_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def interrupted(*args: Any, **kwargs: Any) -> None:
        link(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "link", interrupted)
    with pytest.raises(KeyboardInterrupt):
        JournalLock(FILE).acquire()
    assert os.listdir("logs") == []


def test_a_working_folder_may_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = study_of()
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    study.set_user_attr("a", 1)
    assert study_of(str(tmp_path / FILE)).user_attrs == {"a": 1}
    assert os.listdir(".") == []


def test_a_pickle_of_a_study_needs_no_class_of_this_package() -> None:
    data = pickle.dumps(study_of())
    assert b"sb3_ppo_ewma" not in data
    assert pickle.loads(data).study_name == "study"


# === Lines ===


@pytest.mark.parametrize("torn", [b"{", b'{"op_code":5,"worker_i', b'{"op_code":2,"worker_id":"\xf0', b"\0\0\0"])
def test_half_a_line_is_cut_off(torn: bytes, caplog: pytest.LogCaptureFixture) -> None:
    study_of().set_user_attr("a", 1)
    whole = Path(FILE).read_bytes()
    n_lines = whole.count(b"\n")
    Path(FILE).write_bytes(whole + torn)
    optuna.logging.enable_propagation()
    study = study_of()
    study.set_user_attr("b", 2)
    optuna.logging.disable_propagation()
    assert f"{Path(FILE).absolute()}, line {n_lines + 1}: cut off" in caplog.text
    assert study_of().user_attrs == {"a": 1, "b": 2}
    assert Path(FILE).read_bytes().startswith(whole)


def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    write, written = os.write, []

    def write_half(descriptor: int, data: bytes) -> int:
        if written:
            raise OSError(errno.ENOSPC, "No space left on device")
        if not data.startswith(b'{"op_code"'):
            return write(descriptor, data)
        written.append(data)
        return write(descriptor, data[: len(data) // 2])

    monkeypatch.setattr(os, "write", write_half)


def test_a_record_is_written_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    study = study_of()
    whole = Path(FILE).read_bytes()
    with monkeypatch.context() as patched:
        full_disk(patched)
        with pytest.raises(OSError, match=r"No space left on device.*study\.log"):
            study.set_user_attr("a", 1)
    assert Path(FILE).read_bytes() == whole
    assert os.listdir("logs") == ["study.log"]
    study.set_user_attr("b", 2)
    assert study_of().user_attrs == {"b": 2}


def test_a_limit_on_the_size_of_files() -> None:
    study = study_of()
    whole = Path(FILE).read_bytes()

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 20, resource.RLIM_INFINITY))
        with pytest.raises(OSError, match=r"File too large.*study\.log"):
            study.set_user_attr("a", 1)
        Path("logs/done").touch()

    in_process(limited)
    assert sorted(os.listdir("logs")) == ["done", "study.log"]
    assert Path(FILE).read_bytes() == whole


def test_a_search_on_a_full_disk_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    study = study_of()

    def objective(trial: optuna.Trial) -> float:
        full_disk(monkeypatch)
        return 1.0

    with pytest.raises(OSError, match=r"No space left on device.*study\.log"), journal.naming_errors():
        study.optimize(objective, n_trials=1)


@pytest.mark.parametrize("where", ["first", "middle", "last"])
@pytest.mark.parametrize("garbage", [b"garbage\n", b"\xff\xfe\n", b"12\n", b"{}\n", b"\0\0\n"])
def test_a_line_that_is_no_record_is_named(garbage: bytes, where: str) -> None:
    study_of().set_user_attr("a", 1)
    lines = Path(FILE).read_bytes().splitlines(keepends=True)
    number = {"first": 0, "middle": 2, "last": len(lines)}[where]
    lines.insert(number, garbage)
    Path(FILE).write_bytes(b"".join(lines))
    with pytest.raises(ValueError, match=rf"study\.log, line {number + 1}: not a record"):
        study_of().set_user_attr("b", 1)
    assert Path(FILE).read_bytes() == b"".join(lines)


@pytest.mark.parametrize("content", [b"one line", b"one line\n", b"two\nlines\n", b"epoch,loss\n1,2\n3,"])
def test_a_file_of_another_kind_is_refused_and_stays(content: bytes) -> None:
    Path(FILE).write_bytes(content)
    with pytest.raises(ValueError, match=r"study\.log, line 1: not a record of an Optuna journal"):
        study_of()
    assert Path(FILE).read_bytes() == content


def test_a_record_without_what_it_needs_is_named() -> None:
    study_of().set_user_attr("a", 1)
    data = Path(FILE).read_bytes()
    Path(FILE).write_bytes(data.replace(b'"study_id":0,"user_attr"', b'"studi_id":0,"user_attr"'))
    with pytest.raises(ValueError, match=rf"study\.log, line {data.count(bytes([10]))}: KeyError: 'study_id'"):
        study_of()


def test_errors_of_ones_own_records_stay() -> None:
    study = study_of()
    trial = study.ask({"x": optuna.distributions.FloatDistribution(0, 1)})
    study.tell(trial, 1.0)
    with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):
        trial.set_user_attr("a", 1)
    with pytest.raises(KeyError):
        optuna.load_study(storage=JournalStorage(JournalFileBackend(FILE)), study_name="other")


# === Dead trials ===

STORAGES = ["logs/study.log", "sqlite:///study.db"]


def open_study(storage: Any) -> optuna.Study:
    if storage.endswith(".log"):
        return study_of(storage)
    return optuna.create_study(storage=storage, study_name="study", direction="maximize", load_if_exists=True)


def begin_trial(storage: str) -> None:
    trial = open_study(storage).ask()
    dead_trials.mark(trial)
    trial.suggest_float("x", 0, 1)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_trial_whose_process_has_ended_fails_and_is_tried_again(storage: str) -> None:
    study = open_study(storage)
    own = study.ask()
    dead_trials.mark(own)
    study.ask()  # of whom nobody knows
    in_process(lambda: begin_trial(storage))
    for _ in range(2):  # the second time, nothing is to do
        dead_trials.fail_dead_trials_of(storage, "study")
    states = [trial.state for trial in study.trials]
    assert states == [TrialState.RUNNING, TrialState.RUNNING, TrialState.FAIL, TrialState.WAITING]
    again = study.ask()
    assert again.number == 3
    assert again.suggest_float("x", 0, 1) == study.trials[2].params["x"]


def test_a_trial_says_who_runs_it_before_it_runs() -> None:
    study = study_of()
    study.enqueue_trial({"x": 0.5})
    with dead_trials.searching():
        study.ask()  # the queued one
        study.ask()
    assert [trial.user_attrs[dead_trials.PROCESS]["pid"] for trial in study.trials] == [os.getpid()] * 2
    assert dead_trials.PROCESS not in study.ask().user_attrs  # outside of a search of the zoo, nothing changes


def test_a_trial_that_another_process_takes_first_is_not_said_to_be_ours() -> None:
    study, other = study_of(), study_of()
    study.enqueue_trial({"x": 0.5})
    backend = study._storage._backend  # type: ignore[attr-defined]
    append, n_left = backend.append_logs, 2

    def overtaken(logs: list[dict[str, Any]]) -> None:
        nonlocal n_left
        n_left -= 1
        if n_left == 0:
            assert other.ask().number == 0
        append(logs)

    backend.append_logs = overtaken
    with dead_trials.searching():
        assert study.ask().number == 1
    assert [trial.user_attrs[dead_trials.PROCESS] is None for trial in study.trials] == [True, False]


def test_a_trial_that_ends_its_processes_is_not_tried_for_ever() -> None:
    study = study_of()
    for _ in range(dead_trials.MAX_RETRIES + 2):
        in_process(lambda: begin_trial(FILE))
        dead_trials.fail_dead_trials(study)
    history = [trial.system_attrs.get("retry_history") for trial in study.trials]
    assert history == [None, [0], [0, 1], None, [3]]  # trial 3 is a new one
    assert [trial.state for trial in study.trials] == [TrialState.FAIL] * 4 + [TrialState.WAITING]


def test_a_trial_of_another_machine_is_taken_to_be_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    study = study_of()
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(dead_trials, "_machine", lambda: "elsewhere")
        in_process(lambda: begin_trial(FILE))
    dead_trials.fail_dead_trials(study)
    assert study.trials[0].state == TrialState.RUNNING


def test_a_trial_from_before_a_restart_of_the_machine_is_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    study = study_of()
    begin_trial(FILE)
    monkeypatch.setattr(dead_trials, "_boot", lambda: "another")
    dead_trials.fail_dead_trials(study)
    assert study.trials[0].state == TrialState.FAIL


def test_no_study_is_made_by_the_look_for_dead_trials() -> None:
    for storage, name in ((None, "study"), (FILE, None), (FILE, "study")):
        dead_trials.fail_dead_trials_of(storage, name)
    assert os.listdir("logs") == []
    study_of()
    dead_trials.fail_dead_trials_of(FILE, "other")


def test_injected_faults(tmp_path: Path) -> None:
    bad = [each for each in searches.run(12, seed=0, folder=tmp_path) if each.verdict not in GOOD]
    assert not bad
