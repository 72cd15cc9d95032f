"""
Train PPOEWMA with SB3's arithmetic, with its default and compiled, with the same seeds, and compare what is learned.
From the root of the repository:

    python -m benchmarks.speed.learning --jobs 2

Runs that are in results/learning.csv already are skipped. results/learning.md is written from it and from
results/learning.json, which has every start of the program.
"""

import argparse
import csv
import json
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.metadata import metadata

HERE = Path(__file__).parent
COLUMNS = ["env", "variant", "seed", "mean_reward"]
N_EVALUATION_EPISODES = 50
N_RESAMPLES = 10_000

# rl-zoo3's settings of PPO, Pendulum's without gSDE, which is not compiled
SETTINGS: dict[str, dict[str, Any]] = {
    "CartPole-v1": {
        "total_timesteps": 30_000,
        "n_envs": 8,
        "kwargs": {"n_steps": 32, "batch_size": 256, "gae_lambda": 0.8, "gamma": 0.98, "n_epochs": 20,
                   "learning_rate": 1e-3},
    },
    "Acrobot-v1": {
        "total_timesteps": 100_000,
        "n_envs": 16,
        "kwargs": {"n_steps": 256, "gae_lambda": 0.94, "gamma": 0.99, "n_epochs": 4},
    },
    "Pendulum-v1": {
        "total_timesteps": 100_000,
        "n_envs": 4,
        "kwargs": {"n_steps": 1024, "gae_lambda": 0.95, "gamma": 0.9, "n_epochs": 10, "learning_rate": 1e-3},
    },
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "SB3's arithmetic": {"policy_kwargs": {"optimizer_kwargs": {"eps": 1e-5}}},
    "default": {},
    "compiled": {"torch_compile": True},
}


def train(env_id: str, variant: str, seed: int) -> float:
    """
    :param env_id: environment
    :param variant: name
    :param seed: of the run
    :return: mean reward of the trained policy, deterministic actions
    """
    import torch as th
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy

    from sb3_ppo_ewma import PPOEWMA

    th.set_num_threads(1)
    settings = SETTINGS[env_id]
    env = make_vec_env(env_id, settings["n_envs"], seed=seed)
    model = PPOEWMA("MlpPolicy", env, seed=seed, device="cpu", **settings["kwargs"], **VARIANTS[variant])
    model.learn(settings["total_timesteps"])
    if variant == "compiled" and not model.current_engine.startswith("compiled"):
        raise RuntimeError(f"{env_id} was not compiled")
    evaluation = make_vec_env(env_id, 8, seed=seed + 10_000)
    return float(evaluate_policy(model, evaluation, n_eval_episodes=N_EVALUATION_EPISODES)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envs", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="ENV")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder (default: %(default)s)")
    args = parser.parse_args()
    args.results.mkdir(parents=True, exist_ok=True)
    path = args.results / "learning.csv"
    starts = args.results / "learning.json"
    known = json.loads(starts.read_text()) if starts.is_file() else []
    starts.write_text(json.dumps([*known, metadata()], indent=1) + "\n")
    done = {(row["env"], row["variant"], int(row["seed"])) for row in read(path)}
    runs = [run for env in args.envs for seed in args.seeds for run in ((env, name, seed) for name in VARIANTS)]
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        futures = {pool.submit(train, *run): run for run in runs if run not in done}
        for future in as_completed(futures):
            row = [*map(str, futures[future]), f"{future.result():.2f}"]
            print(*row)
            lines = [row] if path.is_file() else [COLUMNS, row]
            with path.open("a") as file:
                file.write("".join(",".join(line) + "\n" for line in lines))
    (args.results / "learning.md").write_text(report(read(path), json.loads(starts.read_text())))


def read(path: Path) -> list[dict[str, str]]:
    """
    :param path: of the CSV file
    :return: its rows, none if there is no file
    """
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def report(rows: list[dict[str, str]], starts: list[dict[str, Any]]) -> str:
    """
    :param rows: of the CSV file
    :param starts: metadata of every start of the program
    :return: Markdown
    """
    lines = [
        "# What is learned",
        "",
        "Written by `python -m benchmarks.speed.learning` from `learning.csv` and `learning.json`. Mean reward of "
        f"{N_EVALUATION_EPISODES} episodes with deterministic actions after training, mean over seeds; in brackets, "
        f"the difference from the default with the 95 % interval of a bootstrap over seeds ({N_RESAMPLES} resamples).",
        "",
        f"| environment | seeds | {' | '.join(VARIANTS)} |",
        f"|---|---|{'---|' * len(VARIANTS)}",
    ]
    for env in SETTINGS:
        rewards = {
            name: {
                row["seed"]: float(row["mean_reward"]) for row in rows if (row["env"], row["variant"]) == (env, name)
            }
            for name in VARIANTS
        }
        seeds = sorted(set.intersection(*map(set, rewards.values())), key=int)
        cells = [cell(rewards[name], rewards["default"], seeds) for name in VARIANTS] if seeds else []
        lines.append(f"| {env} | {', '.join(seeds)} | {' | '.join(cells)} |")
    lines += ["", "Commands, dates, commits, versions and hardware of every start:", "", "```json"]
    return "\n".join([*lines, json.dumps(starts, indent=1), "```", ""])


def cell(rewards: dict[str, float], reference: dict[str, float], seeds: list[str]) -> str:
    """
    :param rewards: by seed
    :param reference: by seed
    :param seeds: those to compare
    :return: mean, and difference with its interval
    """
    values, others = (np.array([each[seed] for seed in seeds]) for each in (rewards, reference))
    if rewards is reference:
        return f"{values.mean():.1f}"
    # The seeds of one and of the other are resampled independently: after a while, rounding makes other runs of them.
    generator = np.random.default_rng(0)
    samples = generator.choice(values, (N_RESAMPLES, len(seeds))), generator.choice(others, (N_RESAMPLES, len(seeds)))
    low, high = np.percentile(samples[0].mean(axis=1) - samples[1].mean(axis=1), [2.5, 97.5])
    return f"{values.mean():.1f} ({values.mean() - others.mean():+.1f} [{low:+.1f}, {high:+.1f}])"


if __name__ == "__main__":
    main()
