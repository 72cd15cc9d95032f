"""Write files atomically: readers see the old file or the complete new one."""

import contextlib
import os
import pathlib
import stat
from collections.abc import Iterator


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
    Write a temporary file in this context; it replaces ``path`` at the end. If the context raises an error or the
    process is killed, the old file stays as it was.

    A file that exists keeps its permissions; a new one gets those that ``open()`` gives it. If ``path`` is a symbolic
    link, the file that it points to is replaced, and the link stays.

    :param path: the file to replace or create
    :return: path of the temporary file, in the same folder
    """
    target = path.resolve()
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else None
    try:
        if mode is not None:
            temporary.touch(0o600)  # readable by nobody else until it has the permissions of the old file
        yield temporary
        if mode is not None:
            temporary.chmod(mode)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
