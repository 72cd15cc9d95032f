from sb3_ppo_ewma.memory import available_memory


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
