"""Write files atomically: readers see the old file or the complete new one, also after a loss of power."""

import contextlib
import errno
import hashlib
import importlib
import os
import pathlib
import secrets
import shutil
import stat
import warnings
from collections.abc import Iterator
from typing import Any

# Locks of files tell whether the process that writes a temporary file is alive. Windows has none.
_fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
_TRIES = 100
# Temporary files of this process
_written: set[pathlib.Path] = set()
# A folder that forbids new files; a file that is mounted by itself cannot be replaced by another one
_NO_NEW_FILES = {errno.EACCES, errno.EPERM, errno.EROFS}
_NOT_REPLACEABLE = {errno.EBUSY, errno.EXDEV}


def with_default_suffix(path: str | pathlib.Path, suffix: str) -> pathlib.Path:
    """
    Add a suffix to a path that has none, as SB3 does.

    :param path: file name
    :param suffix: suffix with its dot, such as ``".zip"``
    :return: ``path``, with ``suffix`` appended if it has none
    """
    path = pathlib.Path(path)
    return path if path.suffix else pathlib.Path(f"{path}{suffix}")


@contextlib.contextmanager
def replace_atomically(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """
    Write a temporary file in this context; at its end, the file is on the disk (``fsync`` of file and folder) and
    replaces ``path``. If the context raises an error or the process is killed, the old file stays as it was. A
    temporary file that a killed process has left is removed when the same file is next replaced, wherever that process
    ran. Several threads and processes can replace one file: the last one stays.

    A file that exists keeps its permissions and, where this process may set them, its owner and group; a new one gets
    those that ``open()`` gives it. If ``path`` is a symbolic link, the file that it points to is replaced, and the link
    stays. As in SB3, missing folders are made, and if ``path`` is a folder, ``path_2`` is written, with a warning.

    Where the folder takes no new files, and for what is no regular file, there is nothing to replace: as in SB3, the
    file itself is written, so that it is lost if the process is killed meanwhile. A temporary file of this function can
    be given to it again: it is written itself, too.

    :param path: the file to replace or create
    :return: path of the temporary file, in the same folder
    :raises PermissionError: if the file is there and may not be written
    """
    target = _writable(path)
    if target in _written:
        yield target
        return
    old = target.stat() if target.exists() else None
    new = None
    if old is None or stat.S_ISREG(old.st_mode):
        _remove_leftovers(target)
        new = _Temporary.beside(target, is_private=old is not None)
    if new is None:
        yield target
        return
    _written.add(new.path)
    try:
        yield new.path
        new.replace(target, old)
    finally:
        _written.discard(new.path)
        new.close()


class _Temporary:
    """
    A new file, locked as long as this process writes it.

    :param path: its path
    :param descriptor: of the open file
    """

    def __init__(self, path: pathlib.Path, descriptor: int) -> None:
        self.path, self._descriptor = path, descriptor

    @classmethod
    def beside(cls, target: pathlib.Path, is_private: bool) -> "_Temporary | None":
        """
        :param target: the file to replace
        :param is_private: whether only the owner may read the new file
        :return: a new file in its folder; ``None`` if the folder takes none, but ``target`` can be written
        """
        for _ in range(_TRIES):
            path = target.with_name(f"{_prefix(target)}{secrets.token_hex(8)}.tmp")
            try:
                descriptor = os.open(path, _FLAGS, 0o600 if is_private else 0o666)
            except FileExistsError:
                continue
            except OSError as error:
                if error.errno in _NO_NEW_FILES and target.exists():
                    return None
                error.filename = str(target)
                raise
            _lock(descriptor)
            if _has_name(descriptor, path):
                return cls(path, descriptor)
            os.close(descriptor)  # another process has taken it for a dead one's before it was locked
        raise FileExistsError(errno.EEXIST, "no name for a temporary file is free", str(target))

    def replace(self, target: pathlib.Path, old: os.stat_result | None) -> None:
        """
        :param target: the file to replace
        :param old: what is known of it; ``None`` if there was none
        """
        if not _has_name(self._descriptor, self.path):
            raise OSError(errno.ESTALE, "the temporary file was exchanged for another one", str(self.path))
        if old is not None and _fcntl is not None:  # Windows has neither groups nor modes of them
            _take_over(self._descriptor, old)
        os.fsync(self._descriptor)
        if _fcntl is None:
            self._close_descriptor()  # Windows renames no open file
        try:
            os.replace(self.path, target)
        except OSError as error:
            if error.errno not in _NOT_REPLACEABLE:
                raise
            shutil.copyfile(self.path, target)
        _sync_folder(target.parent)

    def close(self) -> None:
        """Remove the file if it is still there."""
        self._close_descriptor()
        self.path.unlink(missing_ok=True)

    def _close_descriptor(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def _writable(path: pathlib.Path) -> pathlib.Path:
    """
    :param path: as given by the user
    :return: the file that is written
    """
    target = path.resolve()
    while target.is_dir():
        warnings.warn(f"Path '{target}' is a folder. Will save instead to {target}_2", stacklevel=4)
        target = target.with_name(f"{target.name}_2").resolve()
    if not target.parent.exists():
        warnings.warn(f"Path '{target.parent}' does not exist. Will create it.", stacklevel=4)
        target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and not os.access(target, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target))
    return target


def _prefix(target: pathlib.Path) -> str:
    """
    :param target: a file
    :return: how the names of its temporary files begin, short also where its own is long
    """
    return f".sb3-save-{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:12]}-"


def _remove_leftovers(target: pathlib.Path) -> None:
    """
    Remove temporary files of processes that were killed while they replaced a file.

    :param target: the file
    """
    if _fcntl is None:
        return
    prefix = _prefix(target)
    with contextlib.suppress(OSError):
        for name in os.listdir(target.parent):
            if name.startswith(prefix) and name.endswith(".tmp"):
                with contextlib.suppress(OSError):
                    _remove_if_dead(target.with_name(name))


def _remove_if_dead(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        own = os.fstat(descriptor)
        if stat.S_ISREG(own.st_mode) and own.st_uid == os.geteuid():
            _fcntl.flock(descriptor, _fcntl.LOCK_EX | _fcntl.LOCK_NB)  # an error while its process is alive
            if _has_name(descriptor, path):
                path.unlink()
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    if _fcntl is not None:
        with contextlib.suppress(OSError):  # a file system without locks, in which nothing is ever removed
            _fcntl.flock(descriptor, _fcntl.LOCK_EX)


def _has_name(descriptor: int, path: pathlib.Path) -> bool:
    """
    :param descriptor: of an open file
    :param path: a path
    :return: whether that is the file at the path
    """
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def _take_over(descriptor: int, old: os.stat_result) -> None:
    """
    :param descriptor: of the new file
    :param old: what is known of the file that it replaces
    """
    own = os.fstat(descriptor)
    mode = stat.S_IMODE(old.st_mode)
    if (own.st_uid, own.st_gid) != (old.st_uid, old.st_gid):
        try:
            os.fchown(descriptor, old.st_uid, old.st_gid)
        except OSError:
            with contextlib.suppress(OSError):
                os.fchown(descriptor, -1, old.st_gid)
        if os.fstat(descriptor).st_gid != old.st_gid:
            mode = (mode & ~0o070) | (mode & 0o007) << 3  # another group may do no more than all others
    os.fchmod(descriptor, mode)


def _sync_folder(folder: pathlib.Path) -> None:
    if _fcntl is None:
        return
    with contextlib.suppress(OSError):  # a file system that cannot, or a folder that may be written and not read
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
