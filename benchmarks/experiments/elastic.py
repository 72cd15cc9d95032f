"""
Does a run that continues with another number of processes learn as much as one that always has one? From the root of
the repository:

    python -m benchmarks.experiments.elastic --jobs 1

Every run has three segments. Each starts new processes, which load the last checkpoint of the segment before. Runs that
are in results/elastic.csv are not repeated.
"""

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.experiments.runs import RETURNS, Variant, execute, parser, zoo_settings
from benchmarks.experiments.training import Result
from benchmarks.metadata import REPOSITORY

N_SEEDS = 5
# Steps of a run, before rounding to segments of whole iterations
N_TIMESTEPS = {"CartPole-v1": 30_000, "Acrobot-v1": 60_000}
ONE, CHANGING = "one process", "1, 2, 1 processes"
# Processes of each segment
N_PROCESSES = {ONE: [1, 1, 1], CHANGING: [1, 2, 1]}
N_SEGMENTS = 3
# Columns of the tests after every tenth of the steps
TESTED = RETURNS[1::2]
QUICK_ENV = "CartPole-v1"
# Lines of the output of a failed process that the error shows
N_LINES = 20


def variants() -> list[Variant]:
    """
    :return: both variants of each task. The zoo's entry is for each process, so two have twice its environments
    """
    found = []
    for env, n_timesteps in N_TIMESTEPS.items():
        entry = zoo_settings("ppo_ewma", env)
        settings = {**entry, "n_timesteps": divisible(n_timesteps, entry), "tuned_for_n_envs": entry["n_envs"]}
        found += [
            Variant(env, name, "ppo_ewma", {**settings, "n_processes": numbers}, is_tested=True)
            for name, numbers in N_PROCESSES.items()
        ]
    return found


def divisible(n_timesteps: int, settings: dict[str, Any]) -> int:
    """
    :param n_timesteps: of a run
    :param settings: entry of the zoo; an iteration has the same number of samples with any number of processes
    :return: the nearest number of steps that gives segments of whole iterations
    """
    samples = settings["n_envs"] * settings["n_steps"] * N_SEGMENTS
    return round(n_timesteps / samples) * samples


def train_in_segments(algo: str, env_id: str, settings: dict[str, Any], seed: int, is_tested: bool) -> Result:
    """
    :param algo: ``ppo_ewma``
    :param env_id: environment
    :param settings: as an entry of the zoo's files, with ``n_processes`` of every segment
    :param seed: of the run
    :param is_tested: must be true
    :return: the returns of its tests, in every second part of the training
    :raises ValueError: for another algorithm, or without tests
    :raises RuntimeError: if a segment fails
    """
    from benchmarks.experiments.segment import JOB, TESTS

    if algo != "ppo_ewma" or not is_tested:
        raise ValueError(f"algo must be ppo_ewma and is_tested True, got {algo} and {is_tested}")
    # An exception, which ends the segment's processes before this one
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    began = time.monotonic()
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / JOB).write_text(json.dumps({"env": env_id, "settings": settings, "seed": seed}))
            numbers = settings["n_processes"]
            for n_ended, n_processes in enumerate(numbers, start=1):
                run_segment(folder, settings["n_timesteps"] * n_ended // len(numbers), n_processes)
            tests = json.loads((folder / TESTS).read_text())
    except SystemExit:
        os._exit(128 + signal.SIGTERM)  # the executor would catch the exception and begin the next run
    by_name = dict(zip(TESTED, tests, strict=True))
    returns = [by_name.get(name, math.nan) for name in RETURNS]
    return Result(returns, wall_seconds=time.monotonic() - began, test_return=tests[-1])


def run_segment(folder: Path, until: int, n_processes: int) -> None:
    """
    :param folder: of the run
    :param until: steps of the run at the end of the segment
    :param n_processes: number of processes that train together
    :raises RuntimeError: if a process fails
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n_processes)]
    start = torchrun if n_processes > 1 else []
    command = [sys.executable, *start, "-m", "benchmarks.experiments.segment", str(folder), str(until)]
    with (folder / "output.txt").open("w+") as output:
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=output, stderr=subprocess.STDOUT)
        try:
            code = process.wait()
        finally:
            process.terminate()  # torchrun ends its processes, too
            process.wait()
        if code != 0:
            output.seek(0)
            tail = "".join(output.readlines()[-N_LINES:])
            raise RuntimeError(f"a segment of {n_processes} process(es) until step {until} failed:\n{tail}")


def report(file: Path) -> None:
    # Here, so that training does not need what reports do.
    from benchmarks.experiments import report as common

    runs = common.load(file)
    envs = [env for env in N_TIMESTEPS if env in set(runs.env)]
    figure, axes = common.panels(envs)
    lines = []
    for env in envs:
        of_env = runs[runs.env == env]
        plot(axes[env], of_env)
        columns: dict[str, list[Any]] = {}
        names = [name for name in N_PROCESSES if name in set(of_env.variant)]
        for measure in ("final_return", "mean_return"):
            scored = of_env.assign(score=of_env[measure])
            scores, means = common.scores(scored), common.means(scored)
            for name in names:
                is_compared = name != ONE and ONE in scores
                less = common.difference(scores[ONE], scores[name]) if is_compared else ""
                columns.setdefault(name, [name, len(scores[name])]).extend([means[name], less])
        headings = ["", "runs", "final return", "less that of one process", "mean return", "less that of one process"]
        title = f"## {env}, {of_env.n_timesteps.iloc[0]:,} steps"
        lines += ["", title, "", *common.table(headings, columns.values())]
    axes[envs[0]].legend(frameon=False, fontsize="small")
    intro = [
        "PPO-EWMA with the zoo's settings. Each run has three segments of the same length; each segment starts new "
        "processes, which load the checkpoint of the segment before. One process: in all segments. 1, 2, 1 processes: "
        "in the second segment, shaded in the figure, `torchrun` starts two data-parallel processes. Each has as many "
        "environments as one process has alone, and `tuned_for_n_envs` rescales the hyper-parameters. "
        + " ".join(_rounding(env, int(runs[runs.env == env].n_timesteps.iloc[0])) for env in envs),
        "",
        "The policy plays 10 test episodes after every tenth of the steps and 50 at the end, with sampled actions. "
        "Final return: the mean of the 50 episodes. Mean return: the mean of the ten tests. The figure shows each "
        "test: the mean of the runs and its 95 % interval.",
        "",
        common.save(figure, file),
    ]
    common.write(file, "Another number of processes during a run", [*intro, *lines])


def _rounding(env: str, n_timesteps: int) -> str:
    """
    :param env: environment
    :param n_timesteps: of its runs
    :return: a sentence on the number of steps, which a smoke test chooses freely
    """
    wanted = N_TIMESTEPS[env]
    if n_timesteps != divisible(wanted, zoo_settings("ppo_ewma", env)):
        return f"{env} has {n_timesteps:,} steps."
    return f"{env} has {n_timesteps:,} steps, the number nearest to {wanted:,} that gives segments of whole iterations."


def plot(axis: Any, runs: Any) -> None:
    """
    :param axis: to draw on
    :param runs: of one environment
    """
    from benchmarks.experiments import report as common
    from benchmarks.statistics import estimate

    n_timesteps = runs.n_timesteps.iloc[0]
    steps = (np.arange(len(TESTED)) + 1) / len(TESTED) * n_timesteps
    axis.axvspan(n_timesteps / N_SEGMENTS, 2 * n_timesteps / N_SEGMENTS, color="gray", alpha=0.12, linewidth=0)
    for variant, color in zip(N_PROCESSES, common.COLORS, strict=False):
        returns = runs[runs.variant == variant][TESTED].to_numpy()
        if len(returns) == 0:
            continue
        band = estimate({variant: returns[:, None]}, lambda each: each.mean(axis=0)[0], common.REPS)[variant]
        axis.plot(steps, [point.value for point in band], color=color, marker=".", label=variant)
        low, high = [point.low for point in band], [point.high for point in band]
        axis.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
    axis.set(xlabel="steps", ylabel="return, mean of the runs", xlim=(0, n_timesteps))
    axis.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))


def main() -> None:
    quick = {"n_timesteps": 384, "n_envs": 2, "tuned_for_n_envs": 2, "n_steps": 32, "batch_size": 32, "n_epochs": 2}
    args = parser(__doc__, "elastic", N_SEEDS).parse_args()
    execute(args, variants(), quick, report, quick_env=QUICK_ENV, function=train_in_segments)


if __name__ == "__main__":
    main()
