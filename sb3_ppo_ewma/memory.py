"""How much memory is left, and giving back what is not needed."""

import ctypes
import functools
import os
import pathlib
from collections.abc import Callable
from typing import Any, cast

_CGROUPS = pathlib.Path("/sys/fs/cgroup")


def available_memory(
    meminfo: pathlib.Path = pathlib.Path("/proc/meminfo"), cgroups: pathlib.Path = _CGROUPS
) -> int | None:
    """
    :param meminfo: the kernel's account of the machine
    :param cgroups: folder of the control groups, in a container those of the container
    :return: bytes that this process can still use, the smaller of what machine and container have left; ``None`` where
        the system does not say (other systems than Linux)
    """
    left = [
        _left_of_machine(meminfo),
        _left_of_group(cgroups, "memory.max", "memory.current"),  # version 2
        _left_of_group(cgroups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),  # version 1
    ]
    return min((number for number in left if number is not None), default=None)


def _left_of_machine(meminfo: pathlib.Path) -> int | None:
    try:
        return int(_entries(meminfo)["MemAvailable:"]) * 1024
    except (OSError, ValueError, KeyError):
        return None


def _left_of_group(folder: pathlib.Path, limit: str, usage: str) -> int | None:
    try:
        # Without a limit, version 2 has the word "max", which is no number, and version 1 a number beyond all memory.
        left = int((folder / limit).read_text()) - int((folder / usage).read_text())
        statistics = _entries(folder / "memory.stat")
    except (OSError, ValueError):
        return None
    # The file cache counts as used and is given up when memory is needed.
    return left + sum(int(statistics.get(name, 0)) for name in ("active_file", "inactive_file"))


def _entries(file: pathlib.Path) -> dict[str, str]:
    words = [line.split() for line in file.read_text().splitlines()]
    return {line[0]: line[1] for line in words if len(line) > 1}


class MemoryReturn:
    """
    Gives memory that was freed, but that the C library keeps, back to the system at every few calls; does nothing where
    it cannot.

    glibc before 2.38 cannot fill the hole of a freed aligned block, which torch's are, with one of the same size
    (https://sourceware.org/bugzilla/show_bug.cgi?id=14581): a process whose minibatches are large grows to a multiple
    of what it needs. Later versions keep less; what they keep is given back too.

    :param every: number of calls
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._n_calls = 0

    def __call__(self) -> None:
        """Count a call and give memory back if it is time."""
        self._n_calls += 1
        trim = _malloc_trim()
        if trim is not None and self._n_calls % self.every == 0:
            trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    trim: Any = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim.argtypes, trim.restype = [ctypes.c_size_t], ctypes.c_int
    return cast("Callable[[int], int] | None", trim)
