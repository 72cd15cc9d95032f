import pathlib
import platform

import pytest

from sb3_ppo_ewma.memory import MemoryReturn, available_memory


def write(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_the_smaller_of_machine_and_container(tmp_path):
    meminfo, cgroups = tmp_path / "meminfo", tmp_path / "cgroup"
    assert available_memory(meminfo, cgroups) is None
    meminfo.write_text("MemTotal:       16000 kB\nMemAvailable:    1000 kB\nHugePages_Total:       0\n")
    assert available_memory(meminfo, cgroups) == 1_024_000
    statistics = "anon 200000\nactive_file 30000\ninactive_file 20000\n"
    write(cgroups, memory__max="max\n", memory__current="300000\n", memory__stat=statistics)
    assert available_memory(meminfo, cgroups) == 1_024_000
    write(cgroups, memory__max="500000\n")
    # 500 000 allowed, 300 000 used, of which 50 000 can be given up
    assert available_memory(meminfo, cgroups) == 250_000
    (cgroups / "memory.stat").unlink()
    assert available_memory(meminfo, cgroups) == 1_024_000


def test_control_groups_of_the_first_version(tmp_path):
    folder = tmp_path / "memory"
    usage = {"memory__usage_in_bytes": "300000\n", "memory__stat": "cache 1\ninactive_file 50000\n"}
    write(folder, memory__limit_in_bytes="500000\n", **usage)
    assert available_memory(tmp_path / "none", tmp_path) == 250_000


def test_this_machine():
    available = available_memory()
    assert available is None or available > 2**20


def resident_set_size() -> int:
    (kilobytes,) = [
        line.split()[1]
        for line in pathlib.Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmRSS")
    ]
    return int(kilobytes) * 1024


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="other C libraries give memory back themselves, or cannot"
)
def test_freed_memory_is_given_back_at_every_second_call():
    give_back = MemoryReturn(every=2)
    # Below the size from which on glibc asks the system for each block; the last ones keep the others from the end.
    blocks = [bytearray(100_000) for _ in range(2000)]
    kept = blocks[-20:]
    filled = resident_set_size()
    del blocks
    give_back()
    assert resident_set_size() > filled - 20_000_000
    give_back()
    assert resident_set_size() < filled - 150_000_000
    assert len(kept) == 20


def test_without_the_function_nothing_happens(monkeypatch):
    monkeypatch.setattr("sb3_ppo_ewma.memory._malloc_trim", lambda: None)
    MemoryReturn(every=1)()
