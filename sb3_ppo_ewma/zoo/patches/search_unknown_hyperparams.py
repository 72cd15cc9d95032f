"""
``-optimize`` does not refuse a misspelled hyper-parameter before the first trial.

Seen in rl_zoo3 2.9.2. ``ExperimentManager.setup_experiment`` builds no model for a search, so the constructor sees the
name only in a trial, after the study was created. Source:
https://github.com/DLR-RM/rl-baselines3-zoo/blob/master/rl_zoo3/exp_manager.py.
"""

import inspect
from typing import Any

from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.utils import ALGOS

from sb3_ppo_ewma.zoo.patches._replace import AnyFunction, replace_function, upstream_source


def is_needed() -> bool:
    """:return: whether upstream prepares a search without a look at the constructor"""
    return "            env.close()\n            return None" in upstream_source(ExperimentManager.setup_experiment)


def apply() -> None:
    """Raise the constructor's ``TypeError`` for an unknown name before the search."""
    replace_function(ExperimentManager, "setup_experiment", _setup_experiment)


def _setup_experiment(upstream: AnyFunction, manager: Any) -> Any:
    result = upstream(manager)
    if result is None:  # a search
        inspect.signature(ALGOS[manager.algo]).bind_partial(**manager._hyperparams)
    return result
