"""A short version of ``python -m benchmarks.faults --parts files``."""

import random
from functools import partial
from pathlib import Path

import pytest

from benchmarks.faults import files
from benchmarks.faults.outcome import GOOD

pytestmark = pytest.mark.long


def test_no_fault_of_a_file_passes_unseen(tmp_path: Path) -> None:
    outcomes = files.run(40, 1, tmp_path)
    assert {outcome.kind for outcome in outcomes} == set(files.SHARES)
    assert [outcome for outcome in outcomes if outcome.verdict not in GOOD] == []


def test_kept_rollouts_of_every_other_run_are_refused(tmp_path: Path) -> None:
    saved = files.Saved("phases", tmp_path)
    outcomes = files.other_runs("other", len(files.OTHERS), [saved], random.Random(0), tmp_path)
    assert {outcome.verdict for outcome in outcomes} == {"refused"}
    own = files.judge("own", "", "x", partial(saved.load_rollouts, saved.rollouts), lambda _: True)
    assert own.verdict == "recovered"


def test_judgement(tmp_path: Path) -> None:
    def fail() -> None:
        raise ValueError("agent.zip: damaged")

    def judge(load: object, name: str = "agent.zip", is_right: bool = True) -> str:
        return files.judge("kind", "detail", name, load, lambda _: is_right).verdict  # type: ignore[arg-type]

    assert judge(fail) == "refused"
    assert judge(fail, name="other.zip") == "unclear"
    assert judge(lambda: 1) == "recovered"
    assert judge(lambda: 1, is_right=False) == "silent"
    assert not files.same({"a": [1.0]}, {"a": [2.0]})
    assert files.same({"a": [1.0]}, {"a": [1.0]})
