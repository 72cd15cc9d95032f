"""The programs in benchmarks/experiments: they end, continue, do not mix settings, and report what the CSV says."""

import csv
import importlib
import json
import pickle
import shutil
from pathlib import Path

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
from gymnasium.utils.env_checker import check_env

from benchmarks.experiments import runs as experiments
from benchmarks.experiments.environments import CUE, CUE_DOORS
from benchmarks.experiments.runs import COLUMNS, RETURNS, Table, Variant
from benchmarks.experiments.training import Result, train
from tests.test_benchmarks import execute

pytestmark = pytest.mark.long

report = pytest.importorskip("benchmarks.experiments.report", reason="needs rliable", exc_type=ImportError)

NAMES = [
    "ewma",
    "defaults",
    "one_epoch",
    "staleness",
    "invariance",
    "center_of_mass",
    "tuned",
    "n_envs",
    "memory_masks",
    "elastic",
]
# The others take half a minute each.
QUICK_EXPERIMENTS = ("staleness", "center_of_mass")
CARTPOLE = {"policy": "MlpPolicy", "n_timesteps": 400, "n_envs": 2, "n_steps": 16, "batch_size": 16, "n_epochs": 1}


def read(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


# === Every experiment ===


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK_EXPERIMENTS else pytest.mark.slow) for name in NAMES]
)
def test_quick_run_and_its_report(name, tmp_path):
    pytest.importorskip("minatar")
    module = f"benchmarks.experiments.{name}"
    printed = execute(module, "--quick", "--jobs", 1, "--results", tmp_path).stdout
    experiment = importlib.import_module(module)
    quick_env = getattr(experiment, "QUICK_ENV", experiments.QUICK_ENV)
    names = [variant.name for variant in experiment.variants() if variant.env == quick_env]
    assert set(getattr(experiment, "QUICK_NAMES", [])) <= set(names)
    rows = read(tmp_path / f"{name}.csv")
    assert sorted(row["variant"] for row in rows) == sorted(getattr(experiment, "QUICK_NAMES", names))
    assert all(np.isfinite(float(row["final_return"])) for row in rows)
    assert f"{len(rows)} of {len(rows)} runs to do" in printed
    figures = {file.name: file.read_bytes() for file in tmp_path.glob("*.[ps][nv]g")}
    assert {f"{name}.png", f"{name}.svg"} <= figures.keys()
    # The same from the CSV alone, without training
    text = (tmp_path / f"{name}.md").read_text().partition("not edited")[2]
    execute(module, "--report", "--results", tmp_path)
    assert (tmp_path / f"{name}.md").read_text().partition("not edited")[2] == text
    assert {file.name: file.read_bytes() for file in tmp_path.glob("*.[ps][nv]g")} == figures
    assert read(tmp_path / f"{name}.csv") == rows


def test_quick_study_and_its_report(tmp_path):
    module = "benchmarks.experiments.tuning"
    execute(module, "--quick", "--jobs", 1, "--results", tmp_path)
    rows = read(tmp_path / "tuning.csv")
    assert [(row["env"], row["trial"], row["state"]) for row in rows] == [
        ("CartPole-v1", "0", "COMPLETE"),
        ("CartPole-v1", "1", "COMPLETE"),
    ]
    text = (tmp_path / "tuning.md").read_text()
    assert "2 trials (2 complete)" in text
    assert "`sb3-ppo-ewma train -optimize" in text
    (tmp_path / "tuning.md").unlink()
    execute(module, "--quick", "--jobs", 1, "--results", tmp_path)  # it is complete
    assert (tmp_path / "tuning.md").read_text() == text
    assert read(tmp_path / "tuning.csv") == rows


def test_settings_of_a_trial():
    from benchmarks.experiments.tuned import drawn

    params = {
        "batch_size_pow": 6, "n_steps_pow": 5, "one_minus_gamma": 0.012344, "one_minus_gae_lambda": 0.05,
        "learning_rate": 0.00123456, "ent_coef": 1.5e-8, "clip_range": 0.2, "n_epochs": 5, "max_grad_norm": 0.51234,
        "net_arch": "tiny", "activation_fn": "relu", "prox_center_of_mass": 8.0, "objective": "clip", "kl_coef": 3.0,
    }  # fmt: skip
    settings = {
        "batch_size": 64, "n_steps": 32, "gamma": 0.9877, "gae_lambda": 0.95, "learning_rate": 0.00123,
        "ent_coef": 1.5e-8, "clip_range": 0.2, "n_epochs": 5, "max_grad_norm": 0.512, "prox_decay": 0.888889,
        "kl_coef": 0.0, "policy_kwargs": "dict(net_arch=dict(pi=[64], vf=[64]), activation_fn=nn.ReLU)",
    }  # fmt: skip
    assert drawn(params) == settings
    assert drawn({**params, "objective": "kl"}) == {**settings, "clip_range": -1.0, "kl_coef": 3.0}


def test_tuned_entries_are_those_of_the_best_candidates():
    from benchmarks.experiments import tuned
    from benchmarks.experiments.tuning import STUDIES

    runs = report.load(experiments.RESULTS / "tuned.csv")
    runs = runs[~runs.variant.isin(tuned.SETTINGS)]
    for env in STUDIES:
        trained, candidates = runs[runs.env == env], tuned.candidates(env)
        assert set(trained.variant) == candidates.keys()
        assert sorted(trained.seed) == sorted(tuned.CANDIDATE_SEEDS * len(candidates))
        best = trained.groupby("variant").mean_return.mean().idxmax()
        assert experiments.zoo_settings("ppo_ewma_tuned", env) == candidates[best]


# A report takes up to a minute; the others are among the slow tests.
QUICK_REPORTS = ("memory_masks",)


@pytest.mark.parametrize(
    "file",
    [
        pytest.param(file, id=file.stem, marks=() if file.stem in QUICK_REPORTS else pytest.mark.slow)
        for file in sorted(experiments.RESULTS.glob("*.csv"))
    ],
)
def test_stored_results_give_the_stored_report(file, tmp_path):
    for each in (file, file.with_suffix(".json"), *experiments.RESULTS.glob("ewma.csv")):
        shutil.copy(each, tmp_path)
    execute(f"benchmarks.experiments.{file.stem}", "--report", "--results", tmp_path)
    text = (tmp_path / f"{file.stem}.md").read_text()
    assert text.partition("not edited")[2] == file.with_suffix(".md").read_text().partition("not edited")[2]
    for suffix in (".png", ".svg"):
        assert file.with_suffix(suffix).is_file()


@pytest.mark.parametrize("name", [name for name in NAMES if (experiments.RESULTS / f"{name}.csv").is_file()])
def test_stored_results_are_of_the_present_settings(name):
    table = Table(experiments.RESULTS / f"{name}.csv")
    experiment = importlib.import_module(f"benchmarks.experiments.{name}")
    variants = [*experiment.variants(), *getattr(experiment, "trials", list)()]
    settings = {(variant.env, variant.name): variant.recorded for variant in variants}
    for env, variant, _ in table.finished():
        assert table.content["settings"][env][variant] == settings[env, variant]


# === Runs ===


@pytest.fixture
def pretend(monkeypatch):
    """Trains nothing; tells what would have been trained."""
    trained = []

    class Now:
        def __init__(self, *args, **kwargs):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *args):
            pass

        def shutdown(self, **kwargs):
            pass

        def submit(self, function, algo, env, settings, seed, is_tested):
            from concurrent.futures import Future

            future = Future()
            trained.append((env, settings["n_envs"], seed))
            if settings["n_envs"] == 13:
                future.set_exception(ValueError("13 is too many"))
            else:
                future.set_result(Result([float(seed)] * len(RETURNS), {"clip_fraction": 0.25}, 1.0))
            return future

    monkeypatch.setattr(experiments, "ProcessPoolExecutor", Now)
    monkeypatch.setattr(experiments.signal, "signal", lambda *_: None)
    monkeypatch.setattr(experiments, "use_one_thread", lambda: None)
    return trained


def variants(*n_envs: int) -> list[Variant]:
    return [Variant("CartPole-v1", f"{n}", "ppo_ewma", {**CARTPOLE, "n_envs": n}) for n in n_envs]


def test_runs_seed_by_seed_and_none_twice(pretend, tmp_path):
    table = Table(tmp_path / "x.csv")
    experiments.train_all(variants(1, 2), [0, 1], table, 2)
    assert pretend == [("CartPole-v1", 1, 0), ("CartPole-v1", 2, 0), ("CartPole-v1", 1, 1), ("CartPole-v1", 2, 1)]
    rows = read(table.file)
    assert list(rows[0]) == COLUMNS
    assert sorted((row["variant"], row["seed"]) for row in rows) == [("1", "0"), ("1", "1"), ("2", "0"), ("2", "1")]
    assert {row["clip_fraction"] for row in rows} == {"0.25"}
    assert Table(table.file).content["starts"][0]["runs"] == 4
    pretend.clear()
    experiments.train_all(variants(1, 2, 3), [0, 1], Table(table.file), 2)
    assert pretend == [("CartPole-v1", 3, 0), ("CartPole-v1", 3, 1)]


def test_failed_runs_are_named_and_the_others_kept(pretend, tmp_path):
    table = Table(tmp_path / "x.csv")
    with pytest.raises(
        SystemExit, match=r"1 of 2 runs failed:\n.*CartPole-v1 13 seed 0: ValueError\('13 is too many'\)"
    ):
        experiments.train_all(variants(13, 2), [0], table, 2)
    assert [row["variant"] for row in read(table.file)] == ["2"]


def test_processes_are_replaced(monkeypatch):
    monkeypatch.setattr(experiments, "RUNS_PER_PROCESS", 2)
    monkeypatch.setattr(experiments, "train", "{1} {3}".format)
    pending = [(variant, seed) for seed in range(3) for variant in variants(1, 2)]
    ended = [(variant.name, seed, result) for variant, seed, result in experiments._results(pending, 1)]
    assert ended == [(variant.name, seed, f"CartPole-v1 {seed}") for variant, seed in pending]


def test_results_of_other_settings_are_not_mixed(pretend, tmp_path):
    file = tmp_path / "x.csv"
    experiments.train_all(variants(1), [0], Table(file), 1)
    changed = [Variant(v.env, v.name, v.algo, {**v.settings, "learning_rate": 1.0}) for v in variants(1)]
    with pytest.raises(SystemExit, match="has runs of 1 in CartPole-v1 with other settings"):
        experiments.train_all(changed, [1], Table(file), 1)
    assert len(read(file)) == 1


def test_a_training_and_its_seed():
    first, again, other = (train("ppo_ewma", "CartPole-v1", CARTPOLE, seed) for seed in (0, 0, 1))
    assert np.array_equal(first.returns, again.returns, equal_nan=True)
    assert not np.array_equal(first.returns, other.returns, equal_nan=True)
    returns = [value for value in first.returns if not np.isnan(value)]
    assert 8 < min(returns) <= max(returns) < 500
    assert {"clip_fraction", "approx_kl", "approx_kl_prox", "entropy_loss"} <= first.diagnostics.keys()
    assert -np.log(2) - 1e-6 < first.diagnostics["entropy_loss"] < -0.5
    tested = train("ppo_ewma", "CartPole-v1", CARTPOLE, 0, is_tested=True)
    assert 8 < tested.final_return == tested.test_return < 500
    assert tested.final_return != first.final_return
    measured = train("ppo_ewma", "CartPole-v1", {**CARTPOLE, "callback": "sb3_ppo_ewma.NoiseScaleCallback"}, 0)
    assert np.array_equal(first.returns, measured.returns, equal_nan=True)
    assert measured.diagnostics["noise_scale_joint"] > 0


# === Environments ===


def play(env_id: str, action_of, seed: int) -> tuple[list[np.ndarray], list[float], bool]:
    """
    :return: observations and rewards of an episode, and whether it was cut short
    """
    env = gym.make(env_id)
    observation, _ = env.reset(seed=seed)
    observations, rewards, is_over = [observation], [], False
    while not is_over:
        action = action_of(observations, env.unwrapped.action_masks())
        observation, reward, terminated, truncated, _ = env.step(action)
        observations.append(observation)
        rewards.append(float(reward))
        is_over = terminated or truncated
    return observations, rewards, truncated


@pytest.mark.parametrize("env_id", [CUE, CUE_DOORS])
def test_cue_environments(env_id):
    check_env(gym.make(env_id).unwrapped, skip_render_check=True)
    n_cues = 4

    def through_open_doors(observations, mask):
        observation = observations[-1]
        assert np.array_equal(observation[n_cues + 1 :], mask)  # what masks know is observed
        is_last = bool(observation[n_cues])
        assert mask.sum() == (2 if env_id == CUE_DOORS and not is_last else n_cues)
        return int(observations[0][:n_cues].argmax()) if is_last else int(np.flatnonzero(mask)[-1])

    observations, rewards, was_cut = play(env_id, through_open_doors, seed=3)
    assert rewards == [0.0] * 4 + [1.0]
    assert not was_cut
    assert observations[0][:n_cues].sum() == 1
    assert not np.any([observation[:n_cues] for observation in observations[1:]])  # the cue is seen once
    assert [observation[n_cues] for observation in observations] == [0.0] * 4 + [1.0] * 2

    def another_door(observations, mask):
        door = through_open_doors(observations, mask)
        return (door + 1) % n_cues if observations[-1][n_cues] else door

    assert play(env_id, another_door, seed=3)[1] == [0.0] * 5


def test_closed_doors_cost_steps():
    _, rewards, was_cut = play(CUE_DOORS, lambda observations, mask: int(np.flatnonzero(~mask)[0]), seed=0)
    assert rewards == [-0.05] * 20
    assert was_cut


def test_a_segment_continues_with_another_number_of_processes(tmp_path):
    from benchmarks.experiments.elastic import run_segment
    from sb3_ppo_ewma import PPOEWMA

    settings = {**CARTPOLE, "normalize": True, "gamma": 0.9, "gae_lambda": 0.5, "learning_rate": "lin_0.01"}
    settings |= {"n_timesteps": 384, "n_steps": 32, "batch_size": 32, "tuned_for_n_envs": 2}
    (tmp_path / "job.json").write_text(json.dumps({"env": "CartPole-v1", "settings": settings, "seed": 0}))
    # An iteration has 64 samples, of 2 environments or 4.
    for until, n_processes, n_envs, n_steps, n_tests in ((128, 2, 4, 16, 3), (256, 1, 2, 32, 6)):
        run_segment(tmp_path, until, n_processes)
        model = PPOEWMA.load(tmp_path / "model.zip")
        assert (model.num_timesteps, model.fitted_hyperparameters["n_envs"], model.n_steps) == (until, n_envs, n_steps)
        # The schedule covers the whole run.
        assert model.learning_rate(model._current_progress_remaining) == pytest.approx(0.01 * (384 - until) / 384)
        with (tmp_path / "vecnormalize.pkl").open("rb") as statistics:
            # Each segment adds the observations of its resets.
            assert pickle.load(statistics).obs_rms.count == pytest.approx(until, abs=8)
        assert len(json.loads((tmp_path / "tests.json").read_text())) == n_tests
    (tmp_path / "job.json").write_text("{}")
    with pytest.raises(RuntimeError, match=r"(?s)a segment of 1 process\(es\) until step 384 failed:.*KeyError: 'env'"):
        run_segment(tmp_path, 384, 1)


# === Reports ===


def table_of(scores: dict[str, list[float]]) -> pd.DataFrame:
    rows = [(name, seed, value) for name, values in scores.items() for seed, value in enumerate(values)]
    return pd.DataFrame(rows, columns=["variant", "seed", "final_return"]).assign(env="X", n_timesteps=100)


def test_normalized_returns():
    runs = report.normalized(table_of({"zero": [9.0, 11.0], "one": [28.0, 32.0], "other": [20.0, 5.0]}), "zero", "one")
    scores = {name: group.score.tolist() for name, group in runs.groupby("variant")}
    assert scores == {"zero": [-0.05, 0.05], "one": [0.9, 1.1], "other": [0.5, -0.25]}


def test_means_and_differences():
    rng = np.random.default_rng(0)
    first, second = rng.normal(1.0, 0.1, 400), rng.normal(0.8, 0.1, 400)
    runs = table_of({"a": list(first), "b": list(second)})
    means = report.means(runs.assign(score=runs.final_return))
    assert means["a"].value == pytest.approx(first.mean())
    # The standard error of a mean is 0.1 / 20, that of a difference of two √2 times as large.
    assert means["a"].high - means["a"].low == pytest.approx(4 * 0.005, rel=0.15)
    difference = report.difference(first[:, None], second[:, None])
    assert difference.value == pytest.approx(second.mean() - first.mean())
    assert difference.high - difference.low == pytest.approx(4 * 0.005 * 2**0.5, rel=0.15)


def test_distance_has_no_sign():
    runs, others = np.zeros((2, 2)), np.array([[0.2, -0.3], [0.4, -0.5]])
    assert report.distance(runs, others).value == pytest.approx((0.3 + 0.4) / 2)
    assert report.difference(runs, others).value == pytest.approx((0.3 - 0.4) / 2)


def test_gaps_in_a_curve_are_interpolated():
    returns = np.full((1, len(RETURNS)), np.nan)
    returns[0, [1, 3]] = [10.0, 20.0]
    runs = pd.DataFrame(returns, columns=RETURNS).assign(n_timesteps=200)
    steps, values = report.curves(runs)
    assert steps[:2].tolist() == [5.0, 15.0]
    assert values[0, :5].tolist() == [10.0, 10.0, 15.0, 20.0, 20.0]
