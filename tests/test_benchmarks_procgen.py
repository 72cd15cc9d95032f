"""benchmarks/procgen: trainings go on from their checkpoints, and the report computes what it says."""

import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from benchmarks.metadata import REPOSITORY
from benchmarks.procgen import __main__ as program
from benchmarks.procgen.curves import COLUMNS, Curve

pytest.importorskip("rl_zoo3", reason="needs rl_zoo3", exc_type=ImportError)
report = pytest.importorskip("benchmarks.procgen.report", reason="needs rliable", exc_type=ImportError)

from benchmarks.procgen import network, processes, training  # noqa: E402  # after the check
from benchmarks.procgen.training import Checkpoints, Plan, Run  # noqa: E402
from tests import ends_of_processes  # noqa: E402
from tests.test_envpool_vec_env import needs_procgen  # noqa: E402

pytestmark = pytest.mark.long

TINY = {name: value for name, value in program.QUICK.items() if name != "policy_kwargs"}
TINY |= {"policy_kwargs": "dict(features_extractor_kwargs=dict(channels=[2], features_dim=4))"}
ITERATION = TINY["n_envs"] * TINY["n_steps"]  # 128 steps
PHASE = TINY["n_policy_iterations"] * ITERATION


# === Training ===


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Trains up to a number of steps; returns the curve."""
    monkeypatch.setattr(network, "_SECONDS", 0.0)

    def run_until(
        run: Run, n_steps: int, seconds: float = 600.0, checkpoint_steps: int = ITERATION, **changes: float
    ) -> Curve:
        plan = Plan(
            training.settings_of(run, {**TINY, **changes}, mixed_precision=False),
            n_steps=n_steps,
            row_steps=2 * ITERATION,
            checkpoint_steps=checkpoint_steps,
            seconds=seconds,
            device="cpu",
            n_threads=1,
            logs=tmp_path / "logs",
            results=tmp_path / "results",
            start={"command": f"until {n_steps}"},
        )
        training.train(run, plan)
        return Curve.read(tmp_path / "results" / run.name)

    return run_until


def checkpoints(folder, run: Run) -> list[str]:
    return [path.name for path in Checkpoints(folder / "logs" / run.name, run.env_id).folders()]


@needs_procgen
@pytest.mark.parametrize("algorithm", ["ppo", "ppo_ewma"])
def test_training_goes_on_from_its_checkpoint(train, tmp_path, algorithm):
    run = Run(algorithm, 64, "coinrun", 3)
    first = train(run, 3 * ITERATION)
    # A row ends at every checkpoint and with the training
    assert [row["env_steps"] for row in first.rows] == [ITERATION, 2 * ITERATION, 3 * ITERATION]
    assert [(start["from_step"], start["to_step"]) for start in first.starts] == [(0, 3 * ITERATION)]
    assert checkpoints(tmp_path, run) == [f"checkpoint_{3 * ITERATION}"]
    for row in first.rows:
        assert 0 < row["stepping_seconds"] < row["seconds"]
        assert 0 < row["training_seconds"] < row["seconds"]
        assert row["stepping_seconds"] + row["training_seconds"] < row["seconds"]
    whole = train(run, 5 * ITERATION)
    assert str(whole.rows[:3]) == str(first.rows)  # NaN is not equal to itself
    assert [row["env_steps"] for row in whole.rows[3:]] == [4 * ITERATION, 5 * ITERATION]
    assert [(start["from_step"], start["to_step"]) for start in whole.starts] == [
        (0, 3 * ITERATION),
        (3 * ITERATION, 5 * ITERATION),
    ]
    assert whole.settings == first.settings
    statistics = tmp_path / "logs" / run.name / f"checkpoint_{5 * ITERATION}" / run.env_id / "vecnormalize.pkl"
    assert statistics.is_file()


@needs_procgen
def test_a_checkpoint_of_other_settings_is_refused(train):
    run = Run("ppo", 64, "coinrun", 0)
    train(run, ITERATION)
    with pytest.raises(ValueError, match=f"checkpoint_{ITERATION} is of a run with other settings"):
        train(run, 2 * ITERATION, learning_rate=1e-4)


@needs_procgen
def test_rewards_are_normalised_as_before_the_checkpoint(train, tmp_path, monkeypatch):
    run = Run("ppo_ewma", 64, "coinrun", 0)
    train(run, 2 * ITERATION)
    counts = []

    class Watching(training.Recorder):
        def _on_training_start(self):
            super()._on_training_start()
            counts.append((self.training_env.ret_rms.count, self.model.policy_ewma.total_weight))

    monkeypatch.setattr(training, "Recorder", Watching)
    train(run, 3 * ITERATION)
    ((count, weight),) = counts
    assert count == pytest.approx(2 * ITERATION, rel=0.02)  # of discounted returns so far
    assert weight > 1.5  # of the average of parameters, 1 before training


@needs_procgen
def test_no_checkpoint_within_a_phase(train, tmp_path):
    run = Run("ppg", 64, "coinrun", 0)
    first = train(run, PHASE + ITERATION)
    assert checkpoints(tmp_path, run) == [f"checkpoint_{PHASE}"]
    assert first.n_steps == PHASE + ITERATION
    whole = train(run, 2 * PHASE)
    assert whole.rows[0] == pytest.approx(first.rows[0], nan_ok=True)
    assert [row["env_steps"] for row in whole.rows] == [PHASE, 2 * PHASE]  # what came after it is gone
    assert [start["from_step"] for start in whole.starts] == [0, PHASE]
    assert whole.starts[0]["to_step"] == PHASE


@needs_procgen
def test_time_is_over(train, tmp_path, monkeypatch):
    run = Run("ppo", 64, "coinrun", 0)
    assert train(run, 100 * ITERATION, seconds=0.0).rows == []
    clock = iter(range(10**9))  # a second passes whenever somebody looks
    monkeypatch.setattr(training.time, "perf_counter", lambda: float(next(clock)))
    curve = train(run, 100 * ITERATION, seconds=150.0, checkpoint_steps=10**9)
    assert 0 < curve.n_steps < 100 * ITERATION
    assert checkpoints(tmp_path, run) == [f"checkpoint_{curve.n_steps}"]


@needs_procgen
def test_an_unfinished_checkpoint_does_not_count(train, tmp_path):
    run = Run("ppo", 64, "coinrun", 0)
    train(run, ITERATION)
    (tmp_path / "logs" / run.name / "unfinished").mkdir()
    assert train(run, 2 * ITERATION).n_steps == 2 * ITERATION
    assert not (tmp_path / "logs" / run.name / "unfinished").exists()


def test_settings_change_where_an_algorithm_has_them():
    changes = {"n_policy_iterations": 32, "learning_rate": 1e-3}
    ppo, ppg = (training.settings_of(Run(algo, 64, "starpilot", 0), changes, True) for algo in ("ppo", "ppg"))
    assert ppg["n_policy_iterations"] == 32
    assert "n_policy_iterations" not in ppo
    assert ppo["learning_rate"] == ppg["learning_rate"] == 1e-3
    assert ppo["policy_kwargs"] == "dict(features_extractor_kwargs=dict(mixed_precision=True))"
    assert "policy_kwargs" not in training.settings_of(Run("ppo", 64, "starpilot", 0), {}, False)


def test_there_is_a_file_for_every_choice():
    for algorithm in program.ALGORITHMS + program.WITH_KL_PENALTY:
        for n_envs in (64, 256):
            for game in program.GAMES:
                assert training.settings_of(Run(algorithm, n_envs, game, 0), {}, False)["n_envs"] == n_envs


# === The program ===


def execute(*arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.procgen", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=check)


def test_a_hyperparameter_that_no_algorithm_has_is_refused(tmp_path, monkeypatch):
    arguments = ["--algorithms", "ppo", "ppg", "--results", tmp_path, "--params", "n_policy_iterations:8", "n_polcy:8"]
    monkeypatch.setattr(sys, "argv", ["procgen", *map(str, arguments)])
    with pytest.raises(SystemExit, match=r"--params: none of ppo, ppg has n_polcy$"):
        program.main()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@needs_procgen
def test_quick_run(tmp_path):
    folders = ["--results", tmp_path / "results", "--logs", tmp_path / "logs"]
    output = execute("--quick", "--algorithms", "ppg_ewma", *folders).stdout
    assert "1 of 1 runs to do" in output
    curve = Curve.read(tmp_path / "results" / "ppg_ewma_64_bigfish_0")
    assert curve.n_steps == program.QUICK_STEPS
    expected = " ".join(["python -m benchmarks.procgen --quick --algorithms ppg_ewma", *map(str, folders)])
    assert [start["command"] for start in curve.starts] == [expected]
    text = (tmp_path / "results" / "README.md").read_text()
    assert "| bigfish | 512 | PPG-EWMA | 4 | 1 |" in text
    assert {"curves.png", "curves.svg"} <= {path.name for path in (tmp_path / "results").iterdir()}
    # Others are not mixed with it.
    others = ["--games", "bigfish", "--algorithms", "ppg_ewma", "--seeds", 0]
    refused = execute(*others, *folders, check=False)
    assert refused.returncode == 1
    assert "ppg_ewma_64_bigfish_0.json is of a run with other settings" in refused.stderr


def test_a_run_that_fails_or_dies_is_told_and_the_others_go_on(monkeypatch):
    monkeypatch.setattr(processes, "_train_and_tell", ends_of_processes.end)
    outcomes = dict(processes.train_in_processes(dict.fromkeys(["fails", "dies", "works"]), n_jobs=2))
    assert outcomes == {"fails": "the reason", "dies": "it was killed", "works": ""}


# === Network ===


def test_passes_of_an_iteration(monkeypatch):
    """A pass forwards takes 1 here, one with the way back 3."""
    monkeypatch.setattr(network, "_seconds_per_sample", lambda passes: 3.0 if passes.has_gradient else 1.0)

    def seconds_per_step(run: Run) -> float:
        from rl_zoo3.utils import ALGOS

        settings = training.settings_of(run, TINY | {"n_aux_epochs": 6, "n_epochs": 2}, False)
        own = {name: value for name, value in settings.items() if name not in ("n_envs", "normalize", "policy_kwargs")}
        return 1 / network.steps_per_second(ALGOS[run.algo](env="CartPole-v1", **own | {"policy": "MlpPolicy"}))

    # Rollout 1, two epochs of 3
    assert seconds_per_step(Run("ppo", 64, "coinrun", 0)) == pytest.approx(7)
    # and the proximal policy in both
    assert seconds_per_step(Run("ppo_ewma", 64, "coinrun", 0)) == pytest.approx(9)
    # or the phase: the policy before it 1, six epochs of 3
    assert seconds_per_step(Run("ppg", 64, "coinrun", 0)) == pytest.approx(7 + 19)
    assert seconds_per_step(Run("ppg_ewma", 64, "coinrun", 0)) == pytest.approx(9 + 19)


# === Report ===


def rows_of(values, counts, steps, **columns) -> pd.DataFrame:
    table = {"env_steps": steps, "episode_reward_mean": values, "n_episodes": counts}
    return pd.DataFrame(table).assign(**columns)


def test_windows_weigh_episodes():
    run = {"algorithm": "ppo", "n_envs": 64, "game": "coinrun", "run": 0}
    rows = rows_of([1.0, 4.0, 10.0, np.nan, 7.0], [2, 1, 3, 0, 5], [4, 8, 12, 16, 20], **run)
    found = report.windows(rows, size=8)
    assert found.env_steps.tolist() == [8, 16]  # the third has not ended
    assert found.episode_reward_mean.tolist() == [2.0, 10.0]  # (2·1 + 4) / 3 episodes; the only row with any
    short = report.windows(rows, size=64)
    assert short.env_steps.tolist() == [20]
    assert short.episode_reward_mean.tolist() == [pytest.approx((2 + 4 + 30 + 35) / 11)]


def test_published_curves():
    published = pd.read_csv(report.HERE / "published_curves.csv")
    assert set(published.game) == set(program.GAMES) == set(report.RANGES)
    assert published.groupby(["algorithm", "game"]).run.nunique().eq(3).all()
    assert (published.env_steps % report.WINDOW == 0).all()
    assert {*report.BESIDE.values()} <= set(published.algorithm)
    scores = report.normalized(published)
    # The greatest possible return of these two is 10.
    assert scores[scores.game.isin(["coinrun", "ninja"])].episode_reward_mean.max() <= 1


def write_runs(folder, games, algorithms, n_windows=2) -> None:
    """Runs that return, in every episode, what was published of PPO's first run."""
    published = pd.read_csv(report.HERE / "published_curves.csv")
    for game in games:
        curve = published[(published.algorithm == "ppo") & (published.game == game) & (published.run == 0)]
        for algorithm in algorithms:
            rows = [
                dict(zip(COLUMNS, [int(steps) - (1 - half) * 2**19, value, 7, 50.0, 10.0, 25.0], strict=True))
                for steps, value in curve[["env_steps", "episode_reward_mean"]].to_numpy()[:n_windows]
                for half in (0, 1)
            ]
            start = {
                "command": "a command", "date": "a day", "commit": "0", "uncommitted_changes": False,
                "versions": {"python": "3.11"}, "hardware": {"cpu": "a CPU", "cores": 2, "system": "a system"},
                "jobs": 1, "device": "a device", "network_steps_per_second": 2**19 / 25, "from_step": 0,
                "to_step": n_windows * report.WINDOW,
            }  # fmt: skip
            Curve({"n_envs": 64}, [start], rows).write(folder / f"{algorithm}_64_{game}_0")


def test_report(tmp_path, capsys):
    write_runs(tmp_path, ["coinrun", "starpilot"], ["ppo", "ppg_ewma_kl"])
    report.report(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.strip() == capsys.readouterr().out.strip()
    published = pd.read_csv(report.HERE / "published_curves.csv")
    at = published[(published.env_steps == 2 * report.WINDOW) & (published.game == "coinrun")]
    value, *others = at[at.algorithm == "ppo"].episode_reward_mean
    mean = np.mean([value, *others])
    expected = f"{value:.2f} | PPO {mean:.2f} ({min(value, *others):.2f} to {max(value, *others):.2f}) |"
    assert f"| coinrun | 2,097,152 | PPO | 64 | 1 | {expected}" in text
    assert "| coinrun | 2,097,152 | PPG-EWMA with KL penalty | 64 | 1 |" in text
    # 2^19 steps in 50 s, 10 of them in the environments, 25 in training; the network alone would take 25.
    assert "| a device | PPO | 64 | 10486 | 20% | 50% | 20972 | 50% |" in text


def test_report_without_runs(tmp_path, capsys):
    report.report(tmp_path)
    assert capsys.readouterr().out == f"No runs in {tmp_path}\n"


def test_mean_of_the_games_needs_all_of_them(tmp_path, monkeypatch):
    titles = []
    panels = report.common.panels
    monkeypatch.setattr(
        report.common, "panels", lambda names, **kwargs: titles.append(names) or panels(names, **kwargs)
    )
    write_runs(tmp_path, ["coinrun", "starpilot"], ["ppo"])
    report.report(tmp_path)
    write_runs(tmp_path, ["maze"], ["ppg"])
    report.report(tmp_path)
    assert titles == [["coinrun", "starpilot", report.OVERALL], ["coinrun", "maze", "starpilot"]]


def test_stored_curves_are_of_the_present_settings():
    for file in sorted((program.HERE / "results").glob("*.json")):
        algorithm, n_envs, game, seed = file.stem.rsplit("_", 3)
        settings = json.loads(file.read_text())["settings"]
        expected = training.settings_of(Run(algorithm, int(n_envs), game, int(seed)), {}, "policy_kwargs" in settings)
        assert settings | {"n_policy_iterations": None} == expected | {"n_policy_iterations": None}
