"""learn, save, load in a fresh process, learn equals the same two calls of learn in one process, to the bit."""

import pathlib
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import torch as th

from tests.resume import PHASIC, RUNS, go_on, phases, resume, start, stop

pytestmark = pytest.mark.long

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[pathlib.Path, dict[str, dict]]:
    """Folder of the interrupted runs, and the final state of the uninterrupted ones."""
    root = tmp_path_factory.mktemp("resume")
    uninterrupted = {}
    for name in RUNS:
        model = start(name)
        stop(model, root / name)
        uninterrupted[name] = go_on(model)
    subprocess.run([sys.executable, "-m", "tests.resume", str(root)], check=True, cwd=ROOT)
    return root, uninterrupted


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Paths at which two nested states differ."""
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f"{path}: {sorted(map(str, a))} against {sorted(map(str, b))}"]
        return [line for key in a for line in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, (list, tuple)):
        return [line for i, (x, y) in enumerate(zip(a, b, strict=True)) for line in differences(x, y, f"{path}/{i}")]
    if isinstance(a, th.Tensor):
        return [] if th.equal(a, b) else [path]
    return [] if a == b else [path]


@pytest.mark.parametrize("name", RUNS)
def test_resumed_run_equals_uninterrupted_run_to_the_bit(name, runs):
    root, uninterrupted = runs
    resumed = th.load(root / f"{name}.pth", weights_only=True)
    assert differences(uninterrupted[name], resumed) == []


def test_generators_matter(runs):
    """The comparison can fail: other random numbers lead elsewhere."""
    root, uninterrupted = runs
    model = resume("ewma", root / "ewma")
    model.set_random_seed(123)
    assert differences(uninterrupted["ewma"]["policy"], go_on(model)["policy"]) != []


def test_average_matters(runs):
    root, uninterrupted = runs
    model = resume("ewma", root / "ewma")
    model.policy_ewma.reset()
    assert differences(uninterrupted["ewma"]["policy"], go_on(model)["policy"]) != []


@pytest.mark.parametrize("name", PHASIC)
def test_runs_are_interrupted_within_a_phase(name, runs):
    root, uninterrupted = runs
    before, after = phases(resume(name, root / name)), uninterrupted[name]["phases"]
    n_stored = 1 if name == "ppg, stale" else 2
    assert (before["number"], len(before["stored"])) == (1, n_stored)
    assert (after["number"], len(after["stored"])) == (2, 1 if name == "ppg, stale" else 2)


@pytest.mark.parametrize("name", ["ppg", "ppg, images", "ppg, both"])
def test_without_the_stored_rollouts_the_phase_starts_anew(name, runs):
    root, uninterrupted = runs
    model = resume(name, root / name, with_rollouts=False)
    with pytest.warns(UserWarning, match="the phase starts anew") as caught:
        resumed = go_on(model)  # three rollouts, a whole phase
    assert len([warning for warning in caught if "starts anew" in str(warning.message)]) == 1
    assert (resumed["phases"]["number"], len(resumed["phases"]["stored"])) == (2, 0)
    assert differences(uninterrupted[name]["policy"], resumed["policy"]) != []
    with warnings.catch_warnings():  # told once
        warnings.simplefilter("error")
        go_on(model)


def test_saving_does_not_disturb_training(tmp_path):
    finals = []
    for save in (False, True):
        np.random.seed(0)
        th.manual_seed(0)
        model = start("seeded")
        if save:
            stop(model, tmp_path / "run")
        finals.append(go_on(model))
    assert differences(*finals) == []


def test_a_model_that_cannot_be_saved_leaves_the_old_file(tmp_path, monkeypatch):
    model = start("ewma")
    path = tmp_path / "agent.zip"
    model.save(tmp_path / "agent")
    before = path.read_bytes()

    def fails(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(th, "save", fails)
    with pytest.raises(OSError, match="no space left"):
        model.save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["agent.zip"]


def test_a_model_is_saved_where_a_link_leads(tmp_path):
    (tmp_path / "link.zip").symlink_to(tmp_path / "agent.zip")
    start("ewma").save(tmp_path / "link.zip")
    assert (tmp_path / "link.zip").is_symlink()
    assert (tmp_path / "agent.zip").stat().st_size > 0
