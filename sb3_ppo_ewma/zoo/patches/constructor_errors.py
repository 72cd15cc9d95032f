"""
A search ends at the first trial whose hyper-parameters the constructor refuses.

Seen in rl_zoo3 2.9.2. ``ExperimentManager.objective`` prunes a trial for errors of ``learn``, but builds the model
outside that ``try``; and it does not catch overflows or too little memory. Source:
https://github.com/DLR-RM/rl-baselines3-zoo/blob/master/rl_zoo3/exp_manager.py.
"""

from pprint import pprint
from typing import Any

import optuna
from rl_zoo3.exp_manager import ExperimentManager

from sb3_ppo_ewma.zoo.patches._replace import AnyFunction, replace_function, upstream_source

# Errors that hyper-parameters can cause: NaNs and refused values, overflows, too little memory (RuntimeError in torch)
_ERRORS = (ValueError, TypeError, AssertionError, ArithmeticError, RuntimeError, MemoryError)


def is_needed() -> bool:
    """:return: whether upstream builds the model of a trial outside of a ``try``"""
    before, constructor, _ = upstream_source(ExperimentManager.objective).partition("ALGOS[self.algo](")
    return bool(constructor) and "try:" not in before


def apply() -> None:
    """Prune the trial."""
    replace_function(ExperimentManager, "objective", _objective)


def _objective(upstream: AnyFunction, manager: Any, trial: optuna.Trial) -> float:
    try:
        return float(upstream(manager, trial))
    except _ERRORS as error:
        print(f"Trial {trial.number} is pruned: {error}")
        pprint(trial.params)
        raise optuna.TrialPruned from error
