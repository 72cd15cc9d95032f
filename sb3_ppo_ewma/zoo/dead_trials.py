"""
Trials of a search whose process was killed. Optuna leaves them running for ever: here they fail, and are tried again.

Every trial says which process runs it. Another process of the same search that sees it can tell whether that one is
still there, if it ran on this machine; a process of another machine is taken to be alive.
"""

import contextlib
import functools
import os
import socket
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

# User attribute of a trial with the process that runs it
PROCESS = "process"
# A trial that kills its processes, as by the memory that it needs, is not tried for ever.
MAX_RETRIES = 2
# How Optuna counts retries, by its RetryFailedTrialCallback
_FIRST, _HISTORY = "failed_trial", "retry_history"


# Searches of this process
_n_searches = 0


@contextlib.contextmanager
def searching() -> Iterator[None]:
    """Within this context, trials in journals say from their first moment on which process runs them."""
    global _n_searches
    _n_searches += 1
    try:
        yield
    finally:
        _n_searches -= 1


def new_trial() -> FrozenTrial | None:
    """
    :return: what a trial begins with; ``None``: with nothing
    """
    if _n_searches == 0:
        return None
    return optuna.create_trial(state=TrialState.RUNNING, user_attrs={PROCESS: _this_process()})


def take(storage: BaseStorage, trial_id: int, attempt: Callable[[], bool]) -> bool:
    """
    Take a trial that is queued, which says who runs it before it runs.

    :param storage: of the trial
    :param trial_id: its id in the storage
    :param attempt: takes it, if no other process does
    :return: whether it is taken
    """
    if _n_searches == 0 or storage.get_trial(trial_id).state != TrialState.WAITING:
        return attempt()
    storage.set_trial_user_attr(trial_id, PROCESS, _this_process())
    is_taken = attempt()
    if not is_taken and storage.get_trial(trial_id).user_attrs.get(PROCESS) == _this_process():
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
            storage.set_trial_user_attr(trial_id, PROCESS, None)  # another one's, whose word this was written over
    return is_taken


def mark(trial: optuna.Trial) -> None:
    """
    Say in a trial that this process runs it.

    :param trial: the trial
    """
    if trial.user_attrs.get(PROCESS) != _this_process():
        trial.set_user_attr(PROCESS, _this_process())


def _this_process() -> dict[str, Any]:
    process = {"machine": _machine(), "boot": _boot(), "pid": os.getpid(), "started": _started()}
    return {**process, "thread": threading.get_ident()}


def fail_dead_trials(study: optuna.Study) -> None:
    """
    Let trials fail whose processes have ended, and queue their hyper-parameters again.

    :param study: the study
    """
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if not _is_dead(trial.user_attrs.get(PROCESS)):
            continue
        try:
            study.tell(trial.number, state=TrialState.FAIL)
        except (ValueError, optuna.exceptions.UpdateFinishedTrialError):  # another process was faster
            continue
        again = " and is tried again" if retry(study, trial.number) else ""
        print(f"Trial {trial.number} has failed{again}: its process has ended without a result")


def fail_dead_trials_of(storage: Any, study_name: str | None) -> None:
    """
    :param storage: file of a journal or URL of a database; ``None``: there is none
    :param study_name: name of a study, which need not be there yet
    """
    if storage is None or study_name is None:
        return
    if storage.endswith(".log"):
        if not Path(storage).is_file():
            return
        storage = JournalStorage(JournalFileBackend(storage))
    with contextlib.suppress(KeyError):  # no such study
        fail_dead_trials(optuna.load_study(storage=storage, study_name=study_name))


def retry(study: optuna.Study, number: int) -> bool:
    """
    Queue the hyper-parameters of a trial again, unless that was done :data:`MAX_RETRIES` times.

    :param study: the study
    :param number: of a trial that was interrupted
    :return: whether they are queued
    """
    trial: FrozenTrial = study.get_trials(deepcopy=False)[number]
    history = [*trial.system_attrs.get(_HISTORY, []), number]
    if len(history) > MAX_RETRIES:
        return False
    attributes = {_FIRST: number, **trial.system_attrs, _HISTORY: history}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.add_trial(
            optuna.create_trial(
                state=TrialState.WAITING,
                params=trial.params,
                distributions=trial.distributions,
                user_attrs={name: value for name, value in trial.user_attrs.items() if name != PROCESS},
                system_attrs=attributes,
            )
        )
    return True


def _is_dead(process: Any) -> bool:
    """
    :param process: what :func:`mark` wrote; ``None``: nothing
    :return: whether that process has certainly ended
    """
    if not isinstance(process, dict) or process.get("machine") != _machine():
        return False
    if process.get("boot") != _boot():
        return True
    pid = process.get("pid")
    if pid == os.getpid():
        return bool(process.get("started") != _started())
    if not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:  # of another user
        return False
    return bool(process.get("started") != _started(pid))


@functools.cache
def _machine() -> str:
    """
    :return: which machine this is, or which container, as far as process ids are concerned
    """
    parts = [socket.gethostname(), _read("/etc/machine-id")]
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(filter(None, parts))


@functools.cache
def _boot() -> str:
    return _read("/proc/sys/kernel/random/boot_id")


def _started(pid: int | None = None) -> str:
    """
    :param pid: id of a process; ``None``: this one
    :return: when it began, in the kernel's ticks; empty where that is unknown, or if it has ended
    """
    fields = _read(f"/proc/{os.getpid() if pid is None else pid}/stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 and fields[0] != "Z" else ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
