"""
A search leaves an empty run folder, which ``enjoy`` then takes for the latest run.

Seen in rl_zoo3 2.9.2. ``ExperimentManager.setup_experiment`` creates the folder for a search too, and
``get_latest_run_id`` counts it. Source:
https://github.com/DLR-RM/rl-baselines3-zoo/blob/master/rl_zoo3/exp_manager.py.
"""

import os
import tempfile
from typing import Any

from rl_zoo3.exp_manager import ExperimentManager

from sb3_ppo_ewma.zoo.patches._replace import AnyFunction, replace_function, upstream_source


def is_needed() -> bool:
    """:return: whether upstream creates the folder before it knows that it only prepares a search"""
    source = upstream_source(ExperimentManager.setup_experiment)
    return "self.create_log_folder()" in source.partition("self.optimize_hyperparameters:")[0]


def apply() -> None:
    """Prepare a search in a temporary folder."""
    replace_function(ExperimentManager, "setup_experiment", _setup_experiment)


def _setup_experiment(upstream: AnyFunction, manager: Any) -> Any:
    if not manager.optimize_hyperparameters:
        return upstream(manager)
    run = manager.save_path, manager.params_path
    with tempfile.TemporaryDirectory() as folder:
        manager.save_path = os.path.join(folder, "run")
        manager.params_path = os.path.join(manager.save_path, manager.env_name)
        try:
            return upstream(manager)
        finally:
            manager.save_path, manager.params_path = run
