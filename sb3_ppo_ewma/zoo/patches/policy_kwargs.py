"""
A trial's ``policy_kwargs`` drop those of the task.

Seen in rl_zoo3 2.9.2. A search updates the dictionary of hyper-parameters, so the sampled ``policy_kwargs`` replace
those of the file, with all that is not sampled; training with ``--trial-id`` does the same. A task whose observations
need their features extractor cannot be searched. Reported in https://github.com/DLR-RM/rl-baselines3-zoo/issues/431.
"""

import contextlib
import io
from typing import Any

from rl_zoo3 import exp_manager
from rl_zoo3.exp_manager import ExperimentManager

from sb3_ppo_ewma.zoo.patches._replace import AnyFunction, replace_function, upstream_source
from sb3_ppo_ewma.zoo.python_values import evaluate


def is_needed() -> bool:
    """:return: whether a search replaces ``policy_kwargs``"""
    return "kwargs.update(sampled_hyperparams)" in upstream_source(ExperimentManager.objective)


def apply() -> None:
    """Let the ``policy_kwargs`` of a trial complete those of the task."""
    replace_function(ExperimentManager, "read_hyperparameters", _read_hyperparameters)
    replace_function(ExperimentManager, "setup_experiment", _setup_experiment)


def _read_hyperparameters(upstream: AnyFunction, manager: Any) -> Any:
    has_trial = manager.trial_id is not None and manager.storage and manager.study_name
    if not has_trial:
        return upstream(manager)
    of_trial = manager.load_trial(manager.storage, manager.study_name, manager.trial_id).get("policy_kwargs", {})
    of_task = _evaluated(_without_trial(upstream, manager).get("policy_kwargs"))
    if not of_task:
        return upstream(manager)
    given = manager.custom_hyperparams
    of_command_line = _evaluated((given or {}).get("policy_kwargs"))
    merged = {**of_task, **of_trial, **of_command_line}
    manager.custom_hyperparams = {**(given or {}), "policy_kwargs": merged}
    try:
        return upstream(manager)
    finally:
        manager.custom_hyperparams = given


def _without_trial(read_hyperparameters: AnyFunction, manager: Any) -> dict[str, Any]:
    trial_id, manager.trial_id = manager.trial_id, None
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            hyperparams, _ = read_hyperparameters(manager)
    finally:
        manager.trial_id = trial_id
    return dict(hyperparams)


def _setup_experiment(upstream: AnyFunction, manager: Any) -> Any:
    result = upstream(manager)
    if result is None:  # a search
        manager._hyperparams = _SearchedHyperparams(manager._hyperparams)
    return result


class _SearchedHyperparams(dict[str, Any]):
    """What a search starts from. Upstream's ``objective`` copies it and updates the copy with what a trial sampled."""

    def copy(self) -> "_SearchedHyperparams":
        return _SearchedHyperparams(self)

    def update(self, sampled: dict[str, Any]) -> None:  # type: ignore[override]  # all that upstream's objective needs
        of_task = _evaluated(self.get("policy_kwargs"))
        super().update(sampled)
        if "policy_kwargs" in sampled:
            self["policy_kwargs"] = {**of_task, **sampled["policy_kwargs"]}


def _evaluated(policy_kwargs: Any) -> dict[str, Any]:
    if isinstance(policy_kwargs, str):
        policy_kwargs = evaluate(policy_kwargs, vars(exp_manager))
    return dict(policy_kwargs or {})
