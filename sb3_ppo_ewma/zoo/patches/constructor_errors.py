"""
A search ends at the first trial whose hyper-parameters the constructor refuses, and prunes every trial that an error in
the user's environment ends.

Seen in rl_zoo3 2.9.2. ``ExperimentManager.objective`` builds the model outside of the ``try`` in which it prunes a
trial for a ``ValueError`` or ``AssertionError`` of ``learn``, whoever raised it. It does not catch overflows or too
little memory. Source: https://github.com/DLR-RM/rl-baselines3-zoo/blob/master/rl_zoo3/exp_manager.py.
"""

from pprint import pprint
from typing import Any

import optuna
from rl_zoo3.exp_manager import ExperimentManager

from sb3_ppo_ewma.zoo.patches._bad_trials import ERRORS, is_bad_trial
from sb3_ppo_ewma.zoo.patches._replace import AnyFunction, replace_function, upstream_source


def is_needed() -> bool:
    """:return: whether upstream builds the model of a trial outside of a ``try``"""
    before, constructor, _ = upstream_source(ExperimentManager.objective).partition("ALGOS[self.algo](")
    return bool(constructor) and "try:" not in before


def apply() -> None:
    """Prune the trial if its hyper-parameters are to blame; else end the search, with the traceback."""
    replace_function(ExperimentManager, "objective", _objective)


def _objective(upstream: AnyFunction, manager: Any, trial: optuna.Trial) -> float:
    try:
        return float(upstream(manager, trial))
    except optuna.TrialPruned as pruned:
        if pruned.__cause__ is None or is_bad_trial(pruned.__cause__):
            raise
        error: BaseException = pruned.__cause__
    except ERRORS as raised:
        if is_bad_trial(raised):
            print(f"Trial {trial.number} is pruned: {raised}")
            pprint(trial.params)
            raise optuna.TrialPruned from raised
        error = raised
    # A RuntimeError keeps its traceback, and shows that of its cause.
    raise RuntimeError(
        f"trial {trial.number} failed, not because of its hyper-parameters: {type(error).__name__}: {error}"
    ) from error
