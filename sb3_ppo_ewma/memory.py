"""How much memory is left."""

import pathlib

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
