"""How much memory is left, and giving back what is not needed."""

import ctypes
import functools
import os
import pathlib
from collections.abc import Callable

_CGROUP = pathlib.Path("/sys/fs/cgroup")


def available_memory(
    meminfo: pathlib.Path = pathlib.Path("/proc/meminfo"), cgroup: pathlib.Path = _CGROUP
) -> int | None:
    """
    :param meminfo: the kernel's account of the machine
    :param cgroup: folder of the container's limits (version 2 of control groups)
    :return: bytes that this process can still use, the smaller of what machine and container have left; ``None`` where
        the system does not say (other systems than Linux)
    """
    limits = []
    if meminfo.is_file():
        entries = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        if "MemAvailable" in entries:
            limits.append(int(entries["MemAvailable"].split()[0]) * 1024)
    try:
        maximum = (cgroup / "memory.max").read_text().strip()
        current = int((cgroup / "memory.current").read_text())
    except (OSError, ValueError):
        maximum = "max"
    if maximum != "max":
        # The file cache, which counts as used, is given up when memory is needed.
        statistics = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        limits.append(int(maximum) - current + int(statistics.get("inactive_file", 0)))
    return min(limits, default=None)


def return_free_memory() -> None:
    """
    Give memory that was freed, but that the C library keeps, back to the system; does nothing where it cannot.

    glibc before 2.38 cannot fill the hole of a freed aligned block, which torch's are, with one of the same size
    (https://sourceware.org/bugzilla/show_bug.cgi?id=14581). The holes that minibatches leave would add up to as much as
    a large phase itself.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
