"""
A run whose model cannot be built, or that is interrupted before, leaves its empty folder, which ``enjoy`` then takes
for the latest run.

Seen in rl_zoo3 2.9.2. ``ExperimentManager.setup_experiment`` creates the folder before it builds the model. Source:
https://github.com/DLR-RM/rl-baselines3-zoo/blob/master/rl_zoo3/exp_manager.py.
"""

import shutil
from typing import Any

from rl_zoo3.exp_manager import ExperimentManager

from sb3_ppo_ewma.zoo.patches._replace import AnyFunction, replace_function, upstream_source


def is_needed() -> bool:
    """:return: whether upstream creates the folder first and never removes it"""
    source = upstream_source(ExperimentManager.setup_experiment)
    return "create_log_folder()" in source.partition("ALGOS[self.algo](")[0] and "rmtree" not in source


def apply() -> None:
    """Remove the folder if the run does not begin."""
    replace_function(ExperimentManager, "create_log_folder", _create_log_folder)
    replace_function(ExperimentManager, "setup_experiment", _setup_experiment)


def _create_log_folder(upstream: AnyFunction, manager: Any) -> None:
    upstream(manager)
    manager.run_folder = manager.save_path


def _setup_experiment(upstream: AnyFunction, manager: Any) -> Any:
    manager.run_folder = None
    try:
        return upstream(manager)
    except BaseException:  # Ctrl+C too
        if manager.run_folder is not None:  # not where another process created it
            shutil.rmtree(manager.run_folder, ignore_errors=True)
        raise
