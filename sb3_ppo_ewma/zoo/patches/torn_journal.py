"""
A journal in which half a line was written, as on a full disk, cannot be read from the next record on; the message about
a file that is damaged, or no journal, names neither file nor line, and that about a full disk is "Should not reach."

Seen in Optuna 5.0. ``JournalFileBackend.append_logs`` appends to whatever is there. Source:
https://github.com/optuna/optuna/blob/master/optuna/storages/journal/_file.py.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import get_lock_file
from rl_zoo3.exp_manager import ExperimentManager

from sb3_ppo_ewma.zoo import journal
from sb3_ppo_ewma.zoo.patches._replace import AnyFunction, replace_function, upstream_source

# What a record that lacks something raises
_ERRORS = (KeyError, TypeError, ValueError, AttributeError, AssertionError)


def is_needed() -> bool:
    """:return: whether upstream appends to a journal without a look at its end"""
    source = upstream_source(JournalFileBackend.append_logs)
    return "get_lock_file(self._lock)" in source and "truncate" not in source


def apply() -> None:
    """Cut such a line off before the next record, write records whole or not at all, and name file and line."""
    replace_function(JournalFileBackend, "append_logs", _append_logs)
    replace_function(JournalFileBackend, "read_logs", _read_logs)
    replace_function(JournalStorage, "_sync_with_backend", _sync_with_backend)
    replace_function(ExperimentManager, "hyperparameters_optimization", _hyperparameters_optimization)


def _append_logs(upstream: AnyFunction, backend: Any, logs: list[dict[str, Any]]) -> None:
    with get_lock_file(backend._lock):
        journal.append(backend._file_path, logs)


def _read_logs(upstream: AnyFunction, backend: Any, log_number_from: int) -> Iterator[dict[str, Any]]:
    return journal.checked(backend._file_path, upstream(backend, log_number_from), log_number_from)


def _sync_with_backend(upstream: AnyFunction, storage: Any) -> None:
    try:
        upstream(storage)
    except _ERRORS as error:
        path, number = getattr(storage._backend, "_file_path", None), storage._replay_result.log_number_read
        if path is None or (isinstance(error, ValueError) and path in str(error)) or number == 0:
            raise
        record = json.loads(Path(path).read_bytes().splitlines()[number - 1])
        if record["worker_id"] == storage._replay_result.worker_id:
            raise  # of what this process itself asked for
        raise ValueError(f"{path}, line {number}: {type(error).__name__}: {error}") from error


def _hyperparameters_optimization(upstream: AnyFunction, manager: Any) -> None:
    with journal.naming_errors():
        upstream(manager)
