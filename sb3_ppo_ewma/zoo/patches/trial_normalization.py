"""
A trial that is trained again is normalised in another way than in the search.

Seen in rl_zoo3 2.9.2. ``VecNormalize`` discounts rewards by the algorithm's ``gamma``, but in a search by the file's
instead of the trial's; and ``normalize`` of the search's command line is not stored with the trial. Source:
``ExperimentManager._preprocess_normalization`` and ``objective`` in
https://github.com/DLR-RM/rl-baselines3-zoo/blob/master/rl_zoo3/exp_manager.py.
"""

import contextvars
import copy
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER

from sb3_ppo_ewma.zoo.patches._replace import AnyFunction, replace_function, upstream_source

# User attribute of a trial
_NORMALIZE = "normalize"
# The trial that is trained; one per thread, for --n-jobs
_trial: contextvars.ContextVar[optuna.Trial | None] = contextvars.ContextVar("trial", default=None)


def is_needed() -> bool:
    """:return: whether upstream makes the environments of a trial without a look at its ``gamma``"""
    return "gamma" not in upstream_source(ExperimentManager.objective)


def apply() -> None:
    """Normalise with the ``gamma`` of the trial, and store ``normalize`` with it."""
    replace_function(ExperimentManager, "objective", _objective)
    replace_function(ExperimentManager, "_maybe_normalize", _maybe_normalize)
    replace_function(ExperimentManager, "load_trial", _load_trial)


def stored_trial(storage: Any, study_name: str, trial_id: int) -> optuna.trial.FrozenTrial:
    """
    :param storage: file of a journal or URL of a database
    :param study_name: name of a study in it
    :param trial_id: number of a trial of the study
    :return: the trial
    """
    if storage.endswith(".log"):
        storage = JournalStorage(JournalFileBackend(storage))
    return optuna.load_study(storage=storage, study_name=study_name).trials[trial_id]


def _objective(upstream: AnyFunction, manager: Any, trial: optuna.Trial) -> float:
    setting = {name: value for name, value in manager.normalize_kwargs.items() if name != "gamma"}
    trial.set_user_attr(_NORMALIZE, setting if manager.normalize and setting else bool(manager.normalize))
    token = _trial.set(trial)
    try:
        return float(upstream(manager, trial))
    finally:
        _trial.reset(token)


def _maybe_normalize(upstream: AnyFunction, manager: Any, env: Any, eval_env: bool) -> Any:
    trial = _trial.get()
    converted = {} if trial is None else HYPERPARAMS_CONVERTER[manager.algo](trial.params)
    if "gamma" in converted:
        manager = copy.copy(manager)
        manager.normalize_kwargs = {**manager.normalize_kwargs, "gamma": converted["gamma"]}
    return upstream(manager, env, eval_env)


def _load_trial(
    upstream: AnyFunction,
    manager: Any,
    storage: str,
    study_name: str,
    trial_id: int | None = None,
    convert: bool = True,
) -> dict[str, Any]:
    hyperparams: dict[str, Any] = upstream(manager, storage, study_name, trial_id, convert)
    if not convert or trial_id is None:
        return hyperparams
    attributes = stored_trial(storage, study_name, trial_id).user_attrs
    stored = {name: attributes[name] for name in (_NORMALIZE,) if name in attributes}
    return {**stored, **hyperparams}
