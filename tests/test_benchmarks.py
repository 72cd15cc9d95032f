"""The programs in benchmarks/: they end, continue, say what failed, and compute what they say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from benchmarks.comparison import run as comparison
from benchmarks.metadata import REPOSITORY

pytestmark = pytest.mark.long

report = pytest.importorskip("benchmarks.comparison.report", reason="needs rliable", exc_type=ImportError)

ALGOS = ["ppo", "ppo_ewma", "ppg", "ppg_ewma"]
CONFIG = Path(comparison.__file__).parent

# Instead of a training: writes evaluations, or fails, by its seed. Also ends well after too few evaluations, as the zoo
# does when it is interrupted.
PRETENDER = """
import pathlib, sys
import numpy as np
folder, algo, name, seed = sys.argv[1:]
if seed == "1":
    sys.exit("the reason why")
steps = np.arange(1, 2 if seed == "2" else 3)
run = pathlib.Path(folder, algo, name)
run.mkdir(parents=True)
np.savez(run / "evaluations.npz", timesteps=100 * steps, results=np.stack([steps, steps + 1.0], axis=1))
"""


def execute(module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)


# === The runs ===


@pytest.fixture
def pretend(tmp_path, monkeypatch):
    """Starts the comparison with children that only pretend; tells which ones were started."""
    started = []

    def train_command(run, folder, args):
        started.append(str(run))
        return [sys.executable, "-c", PRETENDER, str(folder), run.algo, run.name, str(run.seed)]

    def start(*options: object) -> list[str]:
        started.clear()
        folders = ["--results", tmp_path / "results", "--logs", tmp_path / "logs"]
        settings = ["--n-evaluations", 2, "--eval-episodes", 2]
        arguments = ["--envs", "Acrobot-v1", *settings, *folders, *options]
        monkeypatch.setattr(sys, "argv", ["run", *map(str, arguments)])
        comparison.main()
        return list(started)

    monkeypatch.setattr(comparison, "train_command", train_command)
    return start


def test_evaluations_are_collected(pretend, tmp_path):
    pretend("--algos", "ppo", "ppg", "--seeds", 0, 3)
    evaluations = pd.read_csv(tmp_path / "results" / "evaluations.csv")
    assert list(evaluations.columns) == [
        "algo",
        "env",
        "seed",
        "timesteps",
        "mean_reward",
        "n_episodes",
        "wall_seconds",
    ]
    runs = evaluations.set_index(["algo", "seed"]).sort_index()
    assert set(runs.index) == {("ppo", 0), ("ppo", 3), ("ppg", 0), ("ppg", 3)}
    assert list(runs.loc[("ppg", 3)].timesteps) == [100, 200]
    assert list(runs.loc[("ppg", 3)].mean_reward) == [1.5, 2.5]  # of the episodes 1 and 2, then 2 and 3
    assert set(runs.n_episodes) == {2}


def test_seed_by_seed(pretend):
    started = pretend("--algos", "ppo", "ppg", "--seeds", 0, 3)
    assert [run.split()[-1] for run in started] == ["0", "0", "3", "3"]


def test_continues_with_what_is_missing(pretend, tmp_path):
    assert len(pretend("--algos", "ppo", "--seeds", 0)) == 1
    assert pretend("--algos", "ppo", "ppg", "--seeds", 0) == ["ppg Acrobot-v1 seed 0"]
    assert pretend("--algos", "ppo", "ppg", "--seeds", 0) == []
    starts = json.loads((tmp_path / "results" / "metadata.json").read_text())["starts"]
    assert [start["runs"] for start in starts] == [["ppo Acrobot-v1 seed 0"], ["ppg Acrobot-v1 seed 0"]]
    assert all(start["versions"]["torch"] and start["hardware"]["cpu"] and start["date"] for start in starts)


@pytest.mark.parametrize(
    ("seed", "reason"), [(1, "exit status 1"), (2, "1 evaluations instead of 2")], ids=["failed", "interrupted"]
)
def test_a_run_that_fails_is_told_and_repeated(seed, reason, pretend, capsys):
    with pytest.raises(SystemExit, match=f"1 of 2 runs failed: ppo Acrobot-v1 seed {seed}"):
        pretend("--algos", "ppo", "--seeds", seed, 3)
    told = capsys.readouterr().err
    assert reason in told
    assert ("the reason why" in told) == (seed == 1)  # the end of its output
    with pytest.raises(SystemExit):
        assert pretend("--algos", "ppo", "--seeds", seed, 3) == [f"ppo Acrobot-v1 seed {seed}"]


def test_other_settings_are_not_mixed_in(pretend):
    pretend("--algos", "ppo", "--seeds", 0, "--n-timesteps", 1000)
    with pytest.raises(SystemExit, match="other settings"):
        pretend("--algos", "ppo", "--seeds", 3, "--n-timesteps", 2000)
    assert len(pretend("--algos", "ppg", "--seeds", 0, "--n-timesteps", 2000)) == 1  # of which there was none


def test_through_the_zoo(tmp_path):
    small = "{n_timesteps: 128, policy: MlpPolicy, n_envs: 2, n_steps: 32, batch_size: 32"
    (tmp_path / "ppo.yml").write_text(f"CartPole-v1: {small}}}\n")
    (tmp_path / "ppg.yml").write_text(f"CartPole-v1: {small}, n_policy_iterations: 2, n_aux_epochs: 1}}\n")
    folders = ["--config", tmp_path, "--results", tmp_path / "results", "--logs", tmp_path / "logs"]
    budget = ["--algos", "ppo", "ppg", "--envs", "CartPole-v1", "--n-evaluations", 2, "--eval-episodes", 2]
    ended = execute("benchmarks.comparison.run", *budget, "--seeds", 7, *folders)
    assert "2 of 2 runs to do" in ended.stdout
    evaluations = pd.read_csv(tmp_path / "results" / "evaluations.csv")
    assert sorted(zip(evaluations.algo, evaluations.timesteps, strict=True)) == [
        ("ppg", 64),
        ("ppg", 128),
        ("ppo", 64),
        ("ppo", 128),
    ]
    written = yaml.unsafe_load((tmp_path / "logs/seed_7/ppg/CartPole-v1_1/CartPole-v1/args.yml").read_text())
    assert written["seed"] == 7
    assert "0 of 2 runs to do" in execute("benchmarks.comparison.run", *budget, "--seeds", 7, *folders).stdout


@pytest.mark.slow
def test_every_configuration_trains(tmp_path):
    budget = ["--n-timesteps", 64, "--n-evaluations", 1, "--eval-episodes", 1, "--seeds", 0]
    ended = execute("benchmarks.comparison.run", *budget, "--results", tmp_path / "results", "--logs", tmp_path)
    assert "8 of 8 runs to do" in ended.stdout
    evaluations = pd.read_csv(tmp_path / "results" / "evaluations.csv")
    assert set(evaluations.algo) == set(ALGOS)
    assert set(evaluations.env) == {"MinAtar/SpaceInvaders-v1", "Acrobot-v1"}


# === Their settings ===


@pytest.fixture(scope="module")
def configurations():
    return {algo: yaml.safe_load((CONFIG / f"{algo}.yml").read_text()) for algo in ALGOS}


@pytest.mark.parametrize("env", ["MinAtar/SpaceInvaders-v1", "Acrobot-v1"])
def test_algorithms_differ_only_where_they_must(configurations, env):
    aux = {"n_policy_iterations", "n_aux_epochs", "aux_batch_size", "aux_learning_rate"}
    allowed = {
        "ppo_ewma": {"prox_decay"},
        "ppg": {"policy_kwargs", *aux},
        "ppg_ewma": {"policy_kwargs", "prox_decay", *aux},
    }
    ppo = configurations["ppo"][env]
    for algo, names in allowed.items():
        other = configurations[algo][env]
        assert {name for name in {*ppo, *other} if ppo.get(name) != other.get(name)} == names
    assert {**configurations["ppg"][env], "prox_decay": "auto"} == configurations["ppg_ewma"][env]
    # The same network, but for what the critic shares
    architectures = {"critic_arch='dual'", "dict(", ")", ", "}
    rest = configurations["ppg"][env]["policy_kwargs"].replace(ppo.get("policy_kwargs", "dict()")[:-1], "")
    assert "critic_arch='dual'" in rest
    for part in architectures:
        rest = rest.replace(part, "")
    assert rest == ""


@pytest.mark.parametrize(("env", "n_phases"), [("MinAtar/SpaceInvaders-v1", 12), ("Acrobot-v1", 6)])
def test_phases_fit_the_budget(configurations, env, n_phases):
    settings = configurations["ppg"][env]
    steps_per_phase = settings["n_envs"] * settings["n_steps"] * settings["n_policy_iterations"]
    assert settings["n_timesteps"] // steps_per_phase == n_phases


# === The report ===


def evaluations_of(finals: dict[str, list[float]], env: str = "Env-v0") -> pd.DataFrame:
    """Runs of 10 evaluations each: 0, and in the end the given final performance."""
    rows = [
        (algo, env, seed, 100 * step, final if step == 10 else 0.0, 5, 60.0)
        for algo, values in finals.items()
        for seed, final in enumerate(values)
        for step in range(1, 11)
    ]
    return pd.DataFrame(rows, columns=comparison.COLUMNS)


def row_of(text: str, algorithm: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {algorithm} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


METADATA = {"starts": []}


def test_table_of_known_numbers():
    text = report.report(evaluations_of({"ppo": [1.0, 2.0, 3.0, 4.0, 100.0]}), METADATA, reps=50)
    runs, final_iqm, final_mean, area_iqm, seconds = row_of(text, "PPO")
    assert runs == "5"
    assert final_iqm.startswith("3.0 [")  # of 2, 3 and 4
    assert final_mean.startswith("22.0 [")  # 110 / 5
    # Trapezoids: the last of 9 intervals has the area final / 2, so the runs have final / 18.
    assert area_iqm.startswith("0.17 [")
    assert seconds == "60"


def test_intervals_of_runs_that_agree_have_no_width():
    text = report.report(evaluations_of({"ppo": [2.0] * 5, "ppg": [1.0] * 5}), METADATA, reps=50)
    assert row_of(text, "PPO")[1] == "2.00 [2.00, 2.00]"
    assert "PPG: the interval of the IQM is below PPO's. Probability that a run ends better than one of PPO: " in text
    assert "0.00 [0.00, 0.00], below one half" in text


def test_a_difference_is_claimed_only_where_intervals_allow_it():
    finals = {
        "ppo": [1.0, 2.0, 3.0, 4.0, 5.0],
        "ppo_ewma": [1.5, 2.5, 3.5, 4.5, 5.5],
        "ppg": [6.0, 7.0, 8.0, 9.0, 10.0],
        "ppg_ewma": [0.5, 1.5, 2.5, 3.5, 4.5],
    }
    lines = report.report(evaluations_of(finals), METADATA, reps=500).splitlines()
    a_little_better, far, a_little_worse = (line for line in lines if "the interval" in line and line.startswith("- "))
    for line in (a_little_better, a_little_worse):
        assert "PPO's overlap" in line
        assert "not told apart from one half" in line
    assert "above PPO's" in far
    assert "1.00 [1.00, 1.00], above one half" in far


def test_probability_counts_pairs_of_runs():
    # 2 beats 1, 4 beats 1 and 3: 3 of 4 pairs
    table = report.scores(evaluations_of({"ppo": [1.0, 3.0], "ppg": [2.0, 4.0]}), report.final_performance)
    assert report.probabilities_of_improvement(table, reps=50)["ppg"].value == 0.75


def test_unfinished_comparison():
    one = evaluations_of({"ppo": [1.0, 2.0], "ppg": [3.0]}, "A-v0")
    other = evaluations_of({"ppo": [1.0]}, "B-v0")
    text = report.report(pd.concat([one, other]), METADATA, reps=50)
    assert row_of(text.partition("## B-v0")[0], "PPG")[0] == "1"
    assert "No seed has runs" in text.partition("## All environments")[2]


def test_files_of_the_report(tmp_path):
    evaluations_of({"ppo": [1.0, 2.0], "ppg_ewma": [2.0, 3.0]}).to_csv(tmp_path / "evaluations.csv", index=False)
    start = {
        "command": "python -m benchmarks.comparison.run",
        "date": "2020-01-01 00:00 UTC",
        "commit": "abc",
        "uncommitted_changes": True,
        "versions": {"torch": "2.8"},
        "hardware": {"cpu": "A CPU", "cores": 2, "system": "Linux"},
        "jobs": 2,
        "threads_per_run": 1,
        "runs": ["ppo Env-v0 seed 0"],
    }
    (tmp_path / "metadata.json").write_text(json.dumps({"settings": {}, "starts": [start, {**start, "runs": []}]}))
    execute("benchmarks.comparison.report", "--results", tmp_path, "--reps", 50)
    text = (tmp_path / "README.md").read_text()
    assert "Seeds: 0, 1." in text
    assert text.count("`python -m benchmarks.comparison.run`") == 1  # of the start that made runs
    assert "commit abc, with uncommitted changes; torch 2.8" in text
    assert "A CPU, 2 cores" in text
    assert (tmp_path / "learning_curves.png").read_bytes().startswith(b"\x89PNG")


# === Memory ===


def test_memory(tmp_path):
    sizes = ["--n-envs", 2, "--n-steps", 16, "--n-policy-iterations", 3, "--batch-size", 16]
    ended = execute("benchmarks.memory", *sizes, "--output", tmp_path / "memory.json")
    result = json.loads((tmp_path / "memory.json").read_text())
    assert result["stored_bytes"] == 2 * 16 * 3 * (64 * 64 * 3 + 4)
    assert result["rss_peak_bytes"] >= result["rss_before_bytes"] > 50e6  # torch alone takes more
    assert f"stored = {result['ratio']:.3f}" in ended.stdout
    assert result["command"].startswith("python -m benchmarks.memory --n-envs 2")


# === EnvPool ===


def test_envpool(tmp_path):
    pytest.importorskip("envpool")
    few = ["--n-envs", 2, "--rounds", 2, "--seconds", 0.2, "--iterations", 1, "--output", tmp_path / "envpool.json"]
    ended = execute("benchmarks.envpool", *few)
    (result,) = json.loads((tmp_path / "envpool.json").read_text())["results"]
    assert result["n_envs"] == 2
    speeds = result["steps_per_second"]
    assert speeds.keys() == {"EnvPoolVecEnv", "EnvPoolVecEnv, pinned", "DummyVecEnv", "SubprocVecEnv"}
    assert all(len(rounds) == 2 and min(rounds) > 0 for rounds in speeds.values())
    for index, (ratio, pinned) in enumerate(zip(result["ratios"], result["pinned_ratios"], strict=True)):
        best = max(speeds["DummyVecEnv"][index], speeds["SubprocVecEnv"][index])
        assert ratio == pytest.approx(speeds["EnvPoolVecEnv"][index] / best, rel=0.02)
        assert pinned == pytest.approx(speeds["EnvPoolVecEnv, pinned"][index] / best, rel=0.02)
    assert result["learning_steps_per_second"].keys() == speeds.keys()
    assert "while training" in ended.stdout


# === Connect Four ===


@pytest.fixture
def connect_four():
    pytest.importorskip("pettingzoo")
    pytest.importorskip("pygame")  # which the games import
    from benchmarks import connect_four

    return connect_four


def test_one_player_of_connect_four(connect_four):
    from pettingzoo.classic import connect_four_v3

    def against(*columns):
        remaining = list(columns)
        return connect_four.OnePlayer(connect_four_v3.env(), lambda observation, mask: remaining.pop(0))

    # The player begins, and has four in a column before the opponent
    env = against(1, 1, 1)
    observation, _ = env.reset(options={"player": 0})
    assert observation.sum() == 0
    assert [env.step(0)[1:3] for _ in range(4)] == [(0.0, False)] * 3 + [(1.0, True)]
    # The opponent begins and wins
    env = against(1, 1, 1, 1)
    observation, _ = env.reset(options={"player": 1})
    assert observation[5, 1].tolist() == [0, 1]  # a piece of the opponent
    assert [env.step(0)[1:3] for _ in range(3)] == [(0.0, False)] * 2 + [(-1.0, True)]
    # A column of six pieces is full
    env = against(3, 3, 3)
    env.reset(options={"player": 0})
    for _ in range(3):
        assert env.action_masks().all()
        env.step(3)
    assert env.action_masks().tolist() == [True, True, True, False, True, True, True]


def test_who_begins_is_drawn(connect_four):
    from pettingzoo.classic import connect_four_v3

    env = connect_four.OnePlayer(connect_four_v3.env(), lambda observation, mask: 0)
    pieces = [int(env.reset(seed=seed)[0].sum()) for seed in range(20)]
    assert set(pieces) == {0, 1}
    assert pieces == [int(env.reset(seed=seed)[0].sum()) for seed in range(20)]


def test_connect_four(connect_four, tmp_path):
    few = ["--seeds", 0, "--timesteps", 512, "--games", 4, "--output", tmp_path / "connect_four.json"]
    ended = execute("benchmarks.connect_four", *few)
    content = json.loads((tmp_path / "connect_four.json").read_text())
    assert [result["algorithm"] for result in content["results"]] == list(connect_four.ALGORITHMS)
    assert all(result["won"] + result["drawn"] + result["lost"] == 4 for result in content["results"])
    assert content["settings"]["hyperparameters"]["MaskablePPGEWMA"]["n_policy_iterations"] == 8
    assert "MaskablePPO seed 0:" in ended.stdout


def test_stored_games_of_connect_four():
    content = json.loads((REPOSITORY / "benchmarks" / "results" / "connect_four.json").read_text())
    assert len(content["results"]) == 9
    assert all(result["won"] >= content["target"] for result in content["results"])
