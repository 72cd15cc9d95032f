"""
Journal files of Optuna's studies that outlive their processes: the lock of a process that was killed is taken over, and
a line that a full disk or a loss of power has cut short is cut off.

Processes with Optuna's own locks can share a study with those that have these.
"""

import contextlib
import importlib
import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Iterable, Iterator
from typing import Any

from optuna.storages.journal import JournalFileSymlinkLock
from optuna.storages.journal._file import BaseJournalFileLock

# Locks of the system tell whether the process that has a lock file is alive. Windows has none.
_fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None
_FLAGS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | _FLAGS
# Where that cannot be told, a lock that is as it was for so long belongs to nobody, as in Optuna.
_SECONDS_OF_GRACE = 30.0
_SECONDS_BETWEEN_WARNINGS = 10.0
_LONGEST_SLEEP = 1.0
# How a record begins
_BEGINNING = b'{"op_code":'
# How much of a line messages show
_SHOWN = 60
_logger = logging.getLogger(f"optuna.{__name__}")


class JournalLock(BaseJournalFileLock):
    """
    Lock file in the place of Optuna's. As long as its process is alive, the system's ``flock()`` holds it too.

    :param file_path: the journal
    """

    def __init__(self, file_path: str) -> None:
        self._journal = os.path.abspath(file_path)
        self._path = f"{self._journal}.lock"
        self._descriptor: int | None = None
        self._has_looked = False

    def __reduce__(self) -> tuple[Any, ...]:
        return JournalFileSymlinkLock, (self._journal,)  # for the zoo's reports, which others read without this package

    def acquire(self) -> bool:
        """
        Wait until no other process has the lock.

        :return: True
        """
        self.release()  # an interrupt may have kept this process from it
        own = f"{self._path}.{secrets.token_hex(8)}"
        try:
            if _fcntl is not None:
                self._prepare(own)
            self._wait_for(own)
        except BaseException:
            self.release()
            raise
        finally:
            with contextlib.suppress(OSError):
                os.unlink(own)
        return True

    def _prepare(self, own: str) -> None:
        """
        :param own: path of a new file with all that others must find in the lock file, which it becomes
        """
        if not self._has_looked:  # for what killed processes have left
            self._has_looked = True
            folder, name = os.path.split(self._path)
            for each in os.listdir(folder):
                if each.startswith(f"{name}."):
                    _remove_if_dead(os.path.join(folder, each), may_be_empty=True)
        self._descriptor = os.open(own, _NEW, 0o666)
        with contextlib.suppress(OSError):  # a file system without locks, or a full one: a lock as Optuna's
            _fcntl.flock(self._descriptor, _fcntl.LOCK_EX)
            os.write(self._descriptor, _mark())

    def _wait_for(self, own: str) -> None:
        """
        :param own: path of this process's file
        """
        seen, since = None, time.monotonic()
        warned, sleep = since, 0.001
        while not self._create(own):
            is_dead = _remove_if_dead(self._path)
            present = _stat(self._path)
            if is_dead or present is None:
                continue
            if seen is None or not _is_same(present, seen):
                seen, since = present, time.monotonic()
            elif is_dead is None and time.monotonic() - since > _SECONDS_OF_GRACE:
                self._remove(present)
                continue
            if time.monotonic() - warned > _SECONDS_BETWEEN_WARNINGS:
                warned = time.monotonic()
                _logger.warning(f"Waiting for the process that has the lock {self._path}")
            time.sleep(sleep)
            sleep = min(2 * sleep, _LONGEST_SLEEP)

    def _create(self, own: str) -> bool:
        """
        :param own: path of this process's file
        :return: whether this process now has the lock
        """
        if self._descriptor is not None:
            try:
                os.link(own, self._path)
                return True
            except FileExistsError:
                return False
            except OSError:  # a file system without hard links
                os.close(self._descriptor)
                self._descriptor = None
        try:
            self._descriptor = os.open(self._path, _NEW, 0o666)
        except FileExistsError:
            return False
        return True

    def _is_own(self) -> bool:
        present = _stat(self._path)
        return present is not None and os.path.samestat(os.fstat(self._descriptor or 0), present)

    def _remove(self, expected: os.stat_result) -> None:
        """
        :param expected: what is known of a lock that nobody releases
        """
        aside = f"{self._path}{os.getpid()}-{time.monotonic_ns()}.rename"
        with contextlib.suppress(OSError):  # another process was faster
            os.rename(self._path, aside)
            if _is_same(os.lstat(aside), expected):
                seconds = f"{_SECONDS_OF_GRACE:.0f} seconds"
                _logger.warning(f"The lock {self._path} was not released for {seconds}: it is removed")
            else:
                with contextlib.suppress(OSError):  # the lock of a process that came in between
                    os.link(aside, self._path, follow_symlinks=False)
            os.unlink(aside)

    def release(self) -> None:
        """Give the lock back, if this process has it."""
        if self._descriptor is None:
            return
        is_own = self._is_own()
        if _fcntl is None:
            os.close(self._descriptor)  # Windows removes no open file
        if is_own:
            with contextlib.suppress(OSError):
                os.unlink(self._path)
        if _fcntl is not None:
            os.close(self._descriptor)
        self._descriptor = None


def _remove_if_dead(path: str, may_be_empty: bool = False) -> bool | None:
    """
    Remove the lock of a process of this machine that has ended.

    :param path: of a lock file
    :param may_be_empty: whether it is a new file, which may have ended before it became one
    :return: whether the process has ended; ``None`` if that cannot be told
    """
    if _fcntl is None:
        return None
    descriptor = None
    try:
        descriptor = os.open(path, os.O_RDWR | _FLAGS)
        if os.read(descriptor, 1024) not in (_mark(), b"" if may_be_empty else _mark()):
            return None
        _fcntl.flock(descriptor, _fcntl.LOCK_EX | _fcntl.LOCK_NB)
        present = _stat(path)
        if present is not None and os.path.samestat(os.fstat(descriptor), present):
            os.unlink(path)
            _logger.warning(f"A process has ended with the lock {path}, which is removed")
        return True
    except BlockingIOError:
        return False
    except OSError:  # a link, as Optuna's lock; or it is gone
        return None
    finally:
        if descriptor is not None:
            os.close(descriptor)


@contextlib.contextmanager
def naming_errors() -> Iterator[None]:
    """
    Within this context, a search that cannot write its results says so.

    :raises OSError: in the place of Optuna's ``AssertionError: Should not reach.``
    """
    try:
        yield
    except AssertionError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def append(path: str, records: list[dict[str, Any]]) -> None:
    """
    Append records to a journal whose lock this process has: all of them, or nothing.

    :param path: the journal
    :param records: what can be written as JSON
    :raises OSError: if they cannot be written, as on a full disk
    :raises ValueError: if the file is no journal
    """
    data = b"".join(json.dumps(record, separators=(",", ":")).encode() + b"\n" for record in records)
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | getattr(os, "O_BINARY", 0))
    try:
        size = _repaired_size(path, descriptor)
        try:
            written = 0
            while written < len(data):
                written += os.write(descriptor, data[written:])
            os.fsync(descriptor)
        except BaseException as error:
            os.ftruncate(descriptor, size)
            if isinstance(error, OSError) and error.filename is None:
                error.filename = path
            raise
    finally:
        os.close(descriptor)


def _repaired_size(path: str, descriptor: int) -> int:
    """
    Cut off the last line if it was not written to its end.

    :param path: the journal
    :param descriptor: of the open file
    :return: its size
    :raises ValueError: if the file is no journal
    """
    size = os.fstat(descriptor).st_size
    last = _last_line(path, size)
    if last.endswith(b"\n") and not _is_record(last):
        raise ValueError(_about(path, 0, "not a journal"))
    if not last or last.endswith(b"\n"):
        return size
    with open(path, "rb") as file:
        lines = file.readlines()
    if not (
        _is_record(lines[0]) or last.startswith(_BEGINNING) or _BEGINNING.startswith(last) or not last.strip(b"\0")
    ):
        raise ValueError(f"{path}, line 1: not a record of an Optuna journal: {_shown(lines[0])}")
    os.ftruncate(descriptor, size - len(last))
    _logger.warning(
        f"{path}, line {len(lines)}: cut off, as it was not written to its end, which a full disk or the end of a "
        f"process can cause: {_shown(last)}"
    )
    return size - len(last)


def _last_line(path: str, size: int) -> bytes:
    block = 4096
    with open(path, "rb") as file:
        while True:
            start = max(size - block, 0)
            file.seek(start)
            data = file.read(size - start)
            newline = data.rfind(b"\n", 0, max(len(data) - 1, 0))
            if newline >= 0 or start == 0:
                return data[newline + 1 :]
            block *= 16


def checked(path: str, records: Iterable[dict[str, Any]], n_before: int) -> Iterator[dict[str, Any]]:
    """
    :param path: the journal
    :param records: what Optuna reads from it
    :param n_before: number of lines before
    :return: the records
    :raises ValueError: if a line is no record, with its number
    """
    number = n_before
    try:
        for record in records:
            if not _has_keys(record):
                raise ValueError("not a record")
            number += 1
            yield record
    except ValueError as error:
        raise ValueError(_about(path, number, str(error))) from error


def _about(path: str, n_before: int, reason: str) -> str:
    """
    :param path: a journal
    :param n_before: number of lines that are records
    :param reason: of the error, if no line is to blame
    :return: a message with the line that is none
    """
    with open(path, "rb") as file:
        lines = file.readlines()
    for number, line in enumerate(lines[n_before:], n_before + 1):
        if not _is_record(line):
            return (
                f"{path}, line {number}: not a record of an Optuna journal: {_shown(line)}. Without the line, the "
                "rest of the file can be read"
            )
    return f"{path}: {reason}"


def _is_record(line: bytes) -> bool:
    try:
        return line.endswith(b"\n") and _has_keys(json.loads(line))
    except ValueError:
        return False


def _has_keys(record: Any) -> bool:
    return isinstance(record, dict) and {"op_code", "worker_id"} <= record.keys()


def _shown(line: bytes) -> str:
    return repr(line[:_SHOWN]) + ("..." if len(line) > _SHOWN else "")


def _mark() -> bytes:
    return f"held with flock() on {socket.gethostname()}\n".encode()


def _stat(path: str) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except FileNotFoundError:
        return None


def _is_same(one: os.stat_result, other: os.stat_result) -> bool:
    return os.path.samestat(one, other) and one.st_mtime_ns == other.st_mtime_ns
