"""
Two trainings that start at once take the same run folder, and the result of one is lost.

Seen in rl_zoo3 2.9.2. ``ExperimentManager`` looks for the next free number when it is made, and creates the folder
later, whether or not it exists by then (``-uuid`` avoids it). Source: ``ExperimentManager.create_log_folder`` in
https://github.com/DLR-RM/rl-baselines3-zoo/blob/master/rl_zoo3/exp_manager.py.
"""

import os
from typing import Any

from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.utils import get_latest_run_id

from sb3_ppo_ewma.zoo.patches._replace import AnyFunction, replace_function, upstream_source


def is_needed() -> bool:
    """:return: whether upstream takes a folder that exists"""
    return "exist_ok=True" in upstream_source(ExperimentManager.create_log_folder)


def apply() -> None:
    """Create a folder that no other run has, with the next number if the first is taken."""
    replace_function(ExperimentManager, "create_log_folder", _create_log_folder)


def _create_log_folder(upstream: AnyFunction, manager: Any) -> None:
    number = 0
    while True:
        try:
            os.makedirs(manager.save_path)
            break
        except FileExistsError:
            number = max(number, get_latest_run_id(manager.log_path, manager.env_name)) + 1
            manager.save_path = os.path.join(manager.log_path, f"{manager.env_name}_{number}")
            manager.params_path = f"{manager.save_path}/{manager.env_name}"
    upstream(manager)
