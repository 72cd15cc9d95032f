"""
Train every algorithm in every environment with every seed through rl-zoo3 and collect the evaluations that it makes
during training in results/evaluations.csv. From the root of the repository:

    python -m benchmarks.comparison.run --jobs 2

Runs that are in the file already are skipped, so the same command continues an interrupted comparison and repeats what
failed.
"""

import argparse
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import yaml

from benchmarks.metadata import REPOSITORY, metadata

HERE = Path(__file__).parent
ALGORITHMS = ["ppo", "ppo_ewma", "ppg", "ppg_ewma"]
ENVIRONMENTS = ["MinAtar/SpaceInvaders-v1", "Acrobot-v1"]
COLUMNS = ["algo", "env", "seed", "timesteps", "mean_reward", "n_episodes", "wall_seconds"]
LINES_OF_A_FAILURE = 25
# As many runs as cores are quicker than one run on all cores, with networks this small.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Run:
    """One training."""

    algo: str
    env: str
    seed: int

    def __str__(self) -> str:
        return f"{self.algo} {self.env} seed {self.seed}"

    @property
    def name(self) -> str:
        """The zoo's name of its folder: the environment, and 1 for the first run of an algorithm."""
        return f"{self.env.replace('/', '-')}_1"


@dataclass
class Child:
    """A training under way."""

    run: Run
    process: subprocess.Popen[bytes]
    output: TextIO
    began: float

    def failure(self, reason: str) -> str:
        self.output.seek(0)
        tail = "".join(self.output.readlines()[-LINES_OF_A_FAILURE:])
        return f"{reason}; the last lines of {self.output.name}:\n{tail}"


class Results:
    """
    evaluations.csv and metadata.json: what was measured, and with which settings, versions and hardware.

    :param folder: of the two files
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.evaluations, self.metadata = folder / "evaluations.csv", folder / "metadata.json"
        self.content: dict[str, Any] = {"settings": {}, "starts": []}
        if self.metadata.is_file():
            self.content = json.loads(self.metadata.read_text())

    def finished(self) -> set[Run]:
        if not self.evaluations.is_file():
            return set()
        with self.evaluations.open(newline="") as lines:
            return {Run(row["algo"], row["env"], int(row["seed"])) for row in csv.DictReader(lines)}

    def begin(self, settings: dict[Run, dict[str, Any]], start: dict[str, Any]) -> None:
        """
        :param settings: of the runs to come
        :param start: versions, hardware and command
        :raises SystemExit: if there are results of other settings, which must not be mixed with them
        """
        measured = {(run.algo, run.env) for run in self.finished()}
        for run, now in settings.items():
            known = self.content["settings"].setdefault(run.algo, {})
            if (run.algo, run.env) in measured and known.get(run.env) != now:
                sys.exit(
                    f"{self.evaluations} has runs of {run.algo} in {run.env} with other settings: move it and "
                    f"{self.metadata.name} away, or give another folder with --results\n"
                    f"there: {known.get(run.env)}\nnow:   {now}"
                )
            known[run.env] = now
        self.content["starts"].append({**start, "runs": []})
        self._write_metadata()

    def add(self, run: Run, evaluations: dict[str, np.ndarray], wall_seconds: float) -> None:
        rows = [] if self.evaluations.is_file() else [",".join(COLUMNS)]
        for timesteps, rewards in zip(evaluations["timesteps"], evaluations["results"], strict=True):
            mean = f"{np.mean(rewards):.6g}"
            rows.append(f"{run.algo},{run.env},{run.seed},{timesteps},{mean},{len(rewards)},{wall_seconds:.1f}")
        with self.evaluations.open("a") as lines:
            lines.write("\n".join([*rows, ""]))  # in one piece: a part of a run would count as a finished one
        self.content["starts"][-1]["runs"].append(str(run))
        self._write_metadata()

    def _write_metadata(self) -> None:
        temporary = self.metadata.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.content, indent=1) + "\n")
        temporary.replace(self.metadata)


def main() -> None:
    args = parse_arguments()
    results = Results(args.results)
    # Seed by seed, so that what is there after an interruption is balanced
    runs = [Run(algo, env, seed) for seed in args.seeds for env in args.envs for algo in args.algos]
    finished = results.finished()
    pending = [run for run in runs if run not in finished]
    print(f"{len(pending)} of {len(runs)} runs to do", flush=True)
    if not pending:
        return
    start = {**metadata(), "jobs": args.jobs, "threads_per_run": int(ONE_THREAD["OMP_NUM_THREADS"])}
    results.begin({run: settings_of(run, args) for run in pending}, start)
    failures = train_all(pending, args, results)
    for run, reason in failures.items():
        print(f"\n=== {run} failed: {reason}", file=sys.stderr)
    if failures:
        sys.exit(f"{len(failures)} of {len(pending)} runs failed: {', '.join(map(str, failures))}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time, of one thread each (default: 2)")
    parser.add_argument("--algos", nargs="+", default=ALGORITHMS)
    parser.add_argument("--envs", nargs="+", default=ENVIRONMENTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--n-timesteps", type=int, help="instead of those of the hyper-parameters")
    parser.add_argument("--n-evaluations", type=int, default=20, help="of a run, at equal distances (default: 20)")
    parser.add_argument("--eval-episodes", type=int, default=20, help="per evaluation (default: 20)")
    parser.add_argument("--config", type=Path, default=HERE, help="folder of the hyper-parameters, ALGO.yml")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of what is measured")
    parser.add_argument(
        "--logs", type=Path, default=REPOSITORY / "logs" / "comparison", help="folder of what the zoo writes"
    )
    return parser.parse_args()


def settings_of(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    """
    :param run: a run
    :param args: arguments of the program
    :return: everything that its evaluations depend on, but for the seed
    """
    settings: dict[str, Any] = yaml.safe_load((args.config / f"{run.algo}.yml").read_text())[run.env]
    n_timesteps = int(args.n_timesteps or settings["n_timesteps"])
    evaluations = {"n_evaluations": args.n_evaluations, "eval_episodes": args.eval_episodes}
    return {**settings, "n_timesteps": n_timesteps, **evaluations}


def train_all(pending: list[Run], args: argparse.Namespace, results: Results) -> dict[Run, str]:
    """
    :param pending: runs, in their order
    :param args: arguments of the program
    :param results: to which each run is added when it ends
    :return: the runs that failed, with the reasons
    """
    waiting, under_way = deque(pending), list[Child]()
    failures: dict[Run, str] = {}
    try:
        while waiting or under_way:
            while waiting and len(under_way) < args.jobs:
                under_way.append(start(waiting.popleft(), args))
            time.sleep(0.1)
            for child in [child for child in under_way if child.process.poll() is not None]:
                under_way.remove(child)
                wall_seconds = time.monotonic() - child.began
                failure = collect(child, args, results, wall_seconds)
                if failure:
                    failures[child.run] = failure
                n_ended = len(pending) - len(waiting) - len(under_way)
                result = "failed" if failure else "done"
                print(f"[{n_ended}/{len(pending)}] {child.run}: {result} after {wall_seconds:.0f} s", flush=True)
    finally:
        for child in under_way:
            child.process.terminate()
            child.process.wait()
    return failures


def start(run: Run, args: argparse.Namespace) -> Child:
    # A folder per seed: runs that start together never draw the same number for their folders, and the zoo's
    # `all_plots -f logs/comparison/seed_*` finds them all.
    folder = args.logs.resolve() / f"seed_{run.seed}"
    shutil.rmtree(folder / run.algo / run.name, ignore_errors=True)  # of an attempt that did not end
    folder.mkdir(parents=True, exist_ok=True)
    output = (folder / f"{run.algo}_{run.name}.txt").open("w+")
    environment = {**os.environ, **ONE_THREAD, "SB3_PPO_EWMA_TRACEBACK": "1"}
    # The package is found in the root of the repository also where it is not installed.
    process = subprocess.Popen(
        train_command(run, folder, args), cwd=REPOSITORY, env=environment, stdout=output, stderr=subprocess.STDOUT
    )
    return Child(run, process, output, time.monotonic())


def train_command(run: Run, folder: Path, args: argparse.Namespace) -> list[str]:
    n_timesteps = settings_of(run, args)["n_timesteps"]
    options = {
        "--algo": run.algo,
        "--env": run.env,
        "--seed": run.seed,
        "--conf-file": args.config.resolve() / f"{run.algo}.yml",
        "--n-timesteps": n_timesteps,
        "--eval-freq": n_timesteps // args.n_evaluations,
        "--eval-episodes": args.eval_episodes,
        "--n-eval-envs": min(args.eval_episodes, 10),  # only to be quicker
        "--log-folder": folder,
        "--device": "cpu",
        "--verbose": 0,
    }
    words = (str(word) for option in options.items() for word in option)
    return [sys.executable, "-m", "sb3_ppo_ewma.zoo", "train", *words]


def collect(child: Child, args: argparse.Namespace, results: Results, wall_seconds: float) -> str:
    """
    Add a run that ended to the results.

    :param child: the run
    :param args: arguments of the program
    :param results: to add it to
    :param wall_seconds: that it took
    :return: why it failed, with the end of what it printed; empty if it did not
    """
    with child.output:
        if child.process.returncode != 0:
            return child.failure(f"exit status {child.process.returncode}")
        file = Path(child.output.name).parent / child.run.algo / child.run.name / "evaluations.npz"
        evaluations = dict(np.load(file)) if file.is_file() else {"timesteps": np.array([])}
        # The zoo ends with status 0 also when it is interrupted.
        if len(evaluations["timesteps"]) < args.n_evaluations:
            return child.failure(f"{len(evaluations['timesteps'])} evaluations instead of {args.n_evaluations}")
    results.add(child.run, evaluations, wall_seconds)
    return ""


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # through train_all's finally
    main()
