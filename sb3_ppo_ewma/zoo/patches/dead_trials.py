"""
Trials of processes that were killed stay "running" for ever and count for ``--max-total-trials``: a search of which one
process was killed ends with fewer trials than asked for, a search that is started again with none.

Seen in rl_zoo3 2.9.2 with Optuna 5.0. ``ExperimentManager.hyperparameters_optimization`` counts running trials; Optuna
itself finds dead ones only in databases, with a heartbeat that the zoo does not ask for. Source:
https://github.com/DLR-RM/rl-baselines3-zoo/blob/master/rl_zoo3/exp_manager.py.
"""

from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.trial import TrialState
from rl_zoo3.exp_manager import ExperimentManager

from sb3_ppo_ewma.zoo import dead_trials
from sb3_ppo_ewma.zoo.patches._replace import AnyFunction, replace_function, upstream_source


def is_needed() -> bool:
    """:return: whether upstream counts running trials without a look at their processes"""
    source = upstream_source(ExperimentManager.hyperparameters_optimization)
    return "TrialState.RUNNING" in source and "heartbeat" not in source and "fail_stale_trials" not in source


def apply() -> None:
    """Let them fail, and try them again."""
    replace_function(JournalStorage, "create_new_trial", _create_new_trial)
    replace_function(JournalStorage, "set_trial_state_values", _set_trial_state_values)
    replace_function(ExperimentManager, "objective", _objective)
    replace_function(ExperimentManager, "hyperparameters_optimization", _hyperparameters_optimization)


def _create_new_trial(upstream: AnyFunction, storage: Any, study_id: int, template_trial: Any = None) -> int:
    return int(upstream(storage, study_id, template_trial or dead_trials.new_trial()))


def _set_trial_state_values(
    upstream: AnyFunction, storage: Any, trial_id: int, state: TrialState, values: Any = None
) -> bool:
    def attempt() -> bool:
        return bool(upstream(storage, trial_id, state, values))

    return dead_trials.take(storage, trial_id, attempt) if state == TrialState.RUNNING else attempt()


def _objective(upstream: AnyFunction, manager: Any, trial: optuna.Trial) -> float:
    dead_trials.mark(trial)
    if manager.storage is not None:
        dead_trials.fail_dead_trials(trial.study)
    return float(upstream(manager, trial))


def _hyperparameters_optimization(upstream: AnyFunction, manager: Any) -> None:
    dead_trials.fail_dead_trials_of(manager.storage, manager.study_name)
    with dead_trials.searching():
        upstream(manager)
