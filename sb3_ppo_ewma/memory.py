"""How much memory is left."""

import pathlib


def available_memory(
    meminfo: pathlib.Path = pathlib.Path("/proc/meminfo"), cgroups: pathlib.Path = pathlib.Path("/sys/fs/cgroup")
) -> int | None:
    """
    :param meminfo: the kernel's file on the machine's memory
    :param cgroups: folder of the control groups; in a container, the container's
    :return: number of bytes that this process can still use, the minimum of machine and container; ``None`` if unknown,
        as on systems other than Linux
    """
    available = [
        _available_on_machine(meminfo),
        _available_in_group(cgroups, "memory.max", "memory.current"),  # version 2
        _available_in_group(cgroups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),  # version 1
    ]
    return min((n_bytes for n_bytes in available if n_bytes is not None), default=None)


def _available_on_machine(meminfo: pathlib.Path) -> int | None:
    try:
        return int(_read_table(meminfo)["MemAvailable:"]) * 1024
    except (OSError, ValueError, KeyError):
        return None


def _available_in_group(folder: pathlib.Path, limit: str, usage: str) -> int | None:
    try:
        # Without a limit, version 2 has the word "max", a ValueError here, and version 1 a number beyond all memory.
        left = int((folder / limit).read_text()) - int((folder / usage).read_text())
        statistics = _read_table(folder / "memory.stat")
    except (OSError, ValueError):
        return None
    # The file cache counts as used, but the kernel frees it when memory is needed.
    return left + sum(int(statistics.get(name, 0)) for name in ("active_file", "inactive_file"))


def _read_table(file: pathlib.Path) -> dict[str, str]:
    words = [line.split() for line in file.read_text().splitlines()]
    return {line[0]: line[1] for line in words if len(line) > 1}
