"""
``plot_train``, ``all_plots`` and ``benchmark`` find no run of an environment whose name has a slash, such as
``MinAtar/Breakout-v1``; and where the first two find none, they plot nothing, or print "0.0 +/- 0.0", and succeed.

Seen in rl_zoo3 2.9.2. Folders have a dash for the slash, and these scripts look for the name. Sources:
https://github.com/DLR-RM/rl-baselines3-zoo/blob/master/rl_zoo3/benchmark.py and the folder ``plots`` beside it.
"""

import argparse
import contextlib
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import rl_zoo3.utils
from huggingface_sb3 import EnvironmentName

from sb3_ppo_ewma.zoo.patches._replace import AnyFunction, parsed_arguments, replaced, script_source

# benchmark's path of saved hyper-parameters, with the environment's name twice
_PATH = re.compile(r"(?P<env>[^/\\]+/[^/\\]+)_(?P<run>\d+)[/\\](?P=env)$")
_NOTHING = "0.0 +/- 0.0"  # all_plots' text for no runs; it rounds numbers to integers


def is_needed() -> bool:
    """:return: whether a script looks for the name of an environment instead of the name of its folder"""
    plots = "if env in entry.name" in script_source("rl_zoo3.plots.plot_train")
    return plots or '{env_id}_{exp_id}", env_id)' in script_source("rl_zoo3.benchmark")


@contextlib.contextmanager
def apply() -> Iterator[None]:
    """
    Within the context, look for the names of folders. Refuse environments without runs. all_plots' table has a dash for
    what has no evaluations.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced(rl_zoo3.utils, "get_latest_run_id", _get_latest_run_id))
        stack.enter_context(replaced(rl_zoo3.utils, "get_saved_hyperparams", _get_saved_hyperparams))
        stack.enter_context(parsed_arguments(lambda _, arguments: _check(arguments, stack)))
        yield


def _get_latest_run_id(upstream: AnyFunction, log_path: str, env_name: str) -> int:
    return int(upstream(log_path, EnvironmentName(env_name)))


def _get_saved_hyperparams(upstream: AnyFunction, stats_path: str, *args: Any, **kwargs: Any) -> Any:
    match = _PATH.search(stats_path)
    if match is not None and not Path(stats_path).is_dir():
        name = EnvironmentName(match["env"])
        stats_path = f"{stats_path[: match.start()]}{name}_{match['run']}/{name}"
    return upstream(stats_path, *args, **kwargs)


def _check(arguments: argparse.Namespace, stack: contextlib.ExitStack) -> None:
    if not isinstance(getattr(arguments, "env", None), list):  # only the scripts that plot take several
        return
    arguments.env = [str(EnvironmentName(each)) for each in arguments.env]
    if hasattr(arguments, "exp_folder"):
        for env in arguments.env:
            _check_runs(Path(arguments.exp_folder, arguments.algo), env)
        return
    for env in arguments.env:
        _check_evaluations(arguments, env)
    if arguments.labels is not None and len(arguments.labels) != len(arguments.exp_folders):
        raise ValueError(f"-l needs a label for each of the {len(arguments.exp_folders)} folders of -f")
    writer = importlib.import_module("pytablewriter").MarkdownTableWriter
    stack.enter_context(replaced(writer, "write_table", _write_table))


def _check_runs(folder: Path, env: str) -> None:
    if not folder.is_dir():
        return  # an error of upstream's names it
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if not any(env in name for name in names):
        raise ValueError(f"no run of {env} in {folder}, which has {', '.join(names) or 'none'}")


def _check_evaluations(arguments: argparse.Namespace, env: str) -> None:
    folders = [Path(folder, algo.lower()) for folder in arguments.exp_folders for algo in arguments.algos]
    runs = [run for folder in folders if folder.is_dir() for run in folder.iterdir() if env in run.name]
    if not any((run / "evaluations.npz").is_file() for run in runs):
        reason = "its runs have no evaluations.npz: train with --eval-freq" if runs else "it has no runs there"
        raise ValueError(f"no evaluations of {env} in {', '.join(map(str, folders))}: {reason}")


def _write_table(upstream: AnyFunction, writer: Any, *args: Any, **kwargs: Any) -> None:
    for row in writer.value_matrix:  # the lists that all_plots also saves
        row[:] = ["-" if cell == _NOTHING else cell for cell in row]
    upstream(writer, *args, **kwargs)
