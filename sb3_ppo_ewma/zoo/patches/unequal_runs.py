"""
``all_plots`` leaves out runs that are shorter than others without a word, and fails on runs with other numbers of
episodes per evaluation, or with one.

Seen in rl_zoo3 2.9.2. It drops what is not as long as the longest run, joins arrays of unequal sizes, and squeezes away
the axis of a single episode, after which the error of several runs is 0. Source:
https://github.com/DLR-RM/rl-baselines3-zoo/blob/master/rl_zoo3/plots/all_plots.py.
"""

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sb3_ppo_ewma.zoo.patches._replace import AnyFunction, parsed_arguments, replaced, script_source

_FILE = "evaluations.npz"


def is_needed() -> bool:
    """:return: whether upstream squeezes the evaluations of runs, of which it drops the shorter ones"""
    return "np.array(last_eval).squeeze().mean(axis=-1)" in script_source("rl_zoo3.plots.all_plots")


@contextlib.contextmanager
def apply() -> Iterator[None]:
    """
    Within the context, an evaluation is the mean of its episodes, whatever their number. Print which runs are left out;
    refuse what leaves none.
    """
    with replaced(np, "load", _load), parsed_arguments(lambda _, arguments: _check(arguments)):
        yield


def _load(upstream: AnyFunction, file: Any, *args: Any, **kwargs: Any) -> Any:
    log = upstream(file, *args, **kwargs)
    if not isinstance(file, str) or Path(file).name != _FILE:
        return log
    # Twice, because upstream squeezes an axis of length 1
    return {
        name: np.repeat(values.mean(axis=1, keepdims=True), 2, axis=1) if values.ndim == 2 else values
        for name, values in log.items()
    }


def _check(arguments: argparse.Namespace) -> None:
    if not hasattr(arguments, "exp_folders"):
        return
    for folder in (Path(folder, algo.lower()) for folder in arguments.exp_folders for algo in arguments.algos):
        for env in arguments.env if folder.is_dir() else []:
            files = [run / _FILE for run in sorted(folder.iterdir()) if env in run.name]
            runs = {file.parent: _timesteps(file, arguments.key) for file in files if file.is_file()}
            if runs:
                _check_lengths(runs, arguments)


def _timesteps(file: Path, key: str) -> np.ndarray:
    with np.load(file) as log:
        if key not in log:
            raise ValueError(f"{file} has {', '.join(log)}, not {key!r}")
        return np.asarray(log["timesteps"])


def _check_lengths(runs: dict[Path, np.ndarray], arguments: argparse.Namespace) -> None:
    """
    :param runs: timesteps of the evaluations of runs that one curve is the mean of
    :param arguments: arguments of the script
    :raises ValueError: if no run is within ``--min-timesteps`` and ``--max-timesteps``
    """
    first, last = min(each[0] for each in runs.values()), max(each[-1] for each in runs.values())
    if arguments.max_timesteps < first or arguments.min_timesteps > last:
        limit = "--max-timesteps" if arguments.max_timesteps < first else "--min-timesteps"
        raise ValueError(f"{limit} leaves no evaluation: {next(iter(runs)).parent} has them from {first} to {last}")
    longest = max(runs, key=lambda run: len(runs[run]))
    n_longest = len(runs[longest])
    for run, timesteps in runs.items():
        n_compared = sum(timesteps <= arguments.max_timesteps)
        if len(timesteps) == 1:
            print(f"{run} is left out: it has one evaluation, a curve needs two")
        elif arguments.min_timesteps <= 0 and n_compared < min(
            n_longest, sum(runs[longest] <= arguments.max_timesteps)
        ):
            print(
                f"{run} is left out: it has {len(timesteps)} evaluations, {longest.name} {n_longest} (-min 1 keeps it)"
            )
        elif len(timesteps) == n_longest and not np.array_equal(timesteps, runs[longest]):
            print(
                f"{run} was evaluated after other numbers of timesteps than {longest.name}, with which it is averaged"
            )
