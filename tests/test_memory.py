from sb3_ppo_ewma.memory import available_memory, return_free_memory


def test_the_smaller_of_machine_and_container(tmp_path):
    meminfo = tmp_path / "meminfo"
    assert available_memory(meminfo, tmp_path) is None
    meminfo.write_text("MemTotal:       16000 kB\nMemAvailable:    1000 kB\n")
    assert available_memory(meminfo, tmp_path) == 1_024_000
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("300000\n")
    (tmp_path / "memory.stat").write_text("anon 200000\ninactive_file 50000\n")
    assert available_memory(meminfo, tmp_path) == 1_024_000
    (tmp_path / "memory.max").write_text("500000\n")
    # 500 000 allowed, 300 000 used, of which 50 000 can be given up
    assert available_memory(meminfo, tmp_path) == 250_000


def test_this_machine():
    available = available_memory()
    assert available is None or available > 2**20


def test_free_memory_is_returned_where_the_c_library_can(monkeypatch):
    return_free_memory()
    calls = []
    monkeypatch.setattr("sb3_ppo_ewma.memory._malloc_trim", lambda: calls.append)
    return_free_memory()
    assert calls == [0]
    monkeypatch.setattr("sb3_ppo_ewma.memory._malloc_trim", lambda: None)
    return_free_memory()
