"""The programs in benchmarks/parallel run, and what is stored is of their present cases and says what they aim at."""

import json
import statistics
from pathlib import Path

import pytest

from benchmarks.parallel import as_ready, asynchronous, throughput
from benchmarks.speed.cases import CASES, case_settings, entry_settings
from tests.engines import needs_compiler
from tests.test_benchmarks import execute

pytestmark = pytest.mark.long

RESULTS = Path(asynchronous.__file__).parent / "results"


@pytest.mark.slow
@pytest.mark.parametrize("program", ["throughput", "asynchronous"])
def test_a_quick_run(program: str, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    module = f"benchmarks.parallel.{program}"
    few = ["--iterations", 2] if program == "asynchronous" else []
    result = execute(module, "--quick", "--cases", "cartpole", "--rounds", 1, *few, "--output", file)
    assert "CartPole-v1" in result.stdout
    (found,) = json.loads(file.read_text())["results"]
    assert all(len(speeds) == 1 and speeds[0] > 0 for speeds in found["steps_per_second"].values())
    if program == "asynchronous":
        assert found["mean_lags"]["one process"] == found["mean_lags"]["max_policy_lag=0"] == 0
        assert 0 <= found["mean_lags"]["max_policy_lag=1"] <= 1


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts in /proc")
def test_faults_leave_nothing_behind(tmp_path: Path) -> None:
    file = tmp_path / "faults.json"
    result = execute("benchmarks.parallel.faults", "--kinds", "subproc", "--starts", "fork", "--trials", 1,
                     "--output", file)  # fmt: skip
    assert "9 trials, 0 with problems" in result.stdout
    assert len(json.loads(file.read_text())["trials"]) == 9


@needs_compiler
@pytest.mark.slow
def test_a_quick_run_of_compiled_processes(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    module = "benchmarks.parallel.throughput"
    execute(module, "--quick", "--torch-compile", "--cases", "cartpole", "--rounds", 1, "--output", file)
    (found,) = json.loads(file.read_text())["results"]
    assert found["title"].endswith(", compiled")
    assert found["settings"]["kwargs"] == {"torch_compile": True}


@pytest.mark.slow
def test_a_quick_run_as_ready(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    execute("benchmarks.parallel.as_ready", "--quick", "--cases", "instant", "--rounds", 1, "--output", file)
    (found,) = json.loads(file.read_text())["results"]
    assert set(found["steps_per_second"]) == {"together", "as_ready"}
    assert all(len(speeds) == 1 and speeds[0] > 0 for speeds in found["steps_per_second"].values())


@pytest.mark.parametrize(
    ("file", "targets", "kind"),
    [("throughput", throughput.TARGETS, None), ("asynchronous", asynchronous.TARGETS, "max_policy_lag=1")],
)
def test_what_is_stored(file: str, targets: dict[str, float | None], kind: str | None) -> None:
    stored = json.loads((RESULTS / f"{file}.json").read_text())
    assert [each["case"] for each in stored["results"]] == list(targets)
    for each in stored["results"]:
        case = CASES[each["case"]]
        own = {"n_iterations", "kwargs"}
        expected = {**case_settings(case), **entry_settings(case, "ppo_ewma")}
        assert {name: each["settings"][name] for name in expected if name not in own} == {
            name: value for name, value in json.loads(json.dumps(expected)).items() if name not in own
        }
        ratios = each["ratios"] if kind is None else each["ratios"][kind]
        if each["target"] is not None:
            assert statistics.median(ratios) >= each["target"]


def test_what_is_stored_of_environments_of_unequal_speed() -> None:
    stored = json.loads((RESULTS / "as_ready.json").read_text())
    assert [each["case"] for each in stored["results"]] == list(as_ready.CASES)
    for each in stored["results"]:
        case = as_ready.CASES[each["case"]]
        assert {name: each[name] for name in case._fields} == case._asdict()
        assert each["settings"] == as_ready.SETTINGS
        if case.target is not None:
            assert statistics.median(each["ratios"]) >= case.target
