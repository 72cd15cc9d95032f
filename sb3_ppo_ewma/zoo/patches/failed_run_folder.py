"""
A run whose model cannot be built leaves its empty folder, which ``enjoy`` then takes for the latest run.

Seen in rl_zoo3 2.9.2. ``ExperimentManager.setup_experiment`` creates the folder before it builds the model. Source:
https://github.com/DLR-RM/rl-baselines3-zoo/blob/master/rl_zoo3/exp_manager.py.
"""

import shutil
from pathlib import Path
from typing import Any

from rl_zoo3.exp_manager import ExperimentManager

from sb3_ppo_ewma.zoo.patches._replace import AnyFunction, replace_function, upstream_source


def is_needed() -> bool:
    """:return: whether upstream creates the folder first and never removes it"""
    source = upstream_source(ExperimentManager.setup_experiment)
    return "create_log_folder()" in source.partition("ALGOS[self.algo](")[0] and "rmtree" not in source


def apply() -> None:
    """Remove the folder if the run does not begin."""
    replace_function(ExperimentManager, "setup_experiment", _setup_experiment)


def _setup_experiment(upstream: AnyFunction, manager: Any) -> Any:
    is_new = not Path(manager.save_path).exists()
    try:
        return upstream(manager)
    except Exception:
        # Upstream writes args.yml when a run begins: a folder with it belongs to another process that took the same
        # number meanwhile.
        if is_new and not Path(manager.params_path, "args.yml").exists():
            shutil.rmtree(manager.save_path, ignore_errors=True)
        raise
