"""
A search in which every trial was pruned ends with an error of Optuna's, such as "Record does not exist."

Seen in rl_zoo3 2.9.2. ``ExperimentManager.hyperparameters_optimization`` asks for the best trial without a check.
Source: https://github.com/DLR-RM/rl-baselines3-zoo/blob/master/rl_zoo3/exp_manager.py.
"""

from typing import Any

from rl_zoo3.exp_manager import ExperimentManager

from sb3_ppo_ewma.zoo.patches._replace import AnyFunction, replace_function, upstream_source

# Optuna's messages if no trial was completed: of studies in memory and journals, and of those in databases
_OPTUNA_MESSAGES = ("No trials are completed yet.", "Record does not exist.")


def is_needed() -> bool:
    """:return: whether upstream asks for the best trial without a check"""
    source = upstream_source(ExperimentManager.hyperparameters_optimization)
    return '        print("Best trial:")\n        trial = study.best_trial\n' in source


def apply() -> None:
    """Raise a ``ValueError`` with the reason."""
    replace_function(ExperimentManager, "hyperparameters_optimization", _hyperparameters_optimization)


def _hyperparameters_optimization(upstream: AnyFunction, manager: Any) -> None:
    try:
        upstream(manager)
    except ValueError as error:
        if str(error) not in _OPTUNA_MESSAGES:
            raise
        raise ValueError(
            "no trial was completed: each one was pruned or failed, for the reasons printed above"
        ) from None
