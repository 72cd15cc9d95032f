"""
``--trial-id 0`` trains without the trial, and so does ``--trial-id`` without ``--storage`` or ``--study-name``.

Seen in rl_zoo3 2.9.2. ``ExperimentManager.read_hyperparameters`` tests ``if ... and self.trial_id``, which is false
for the first trial of a study. The same line is reported for a missing number in
https://github.com/DLR-RM/rl-baselines3-zoo/issues/498.
"""

from typing import Any

from rl_zoo3.exp_manager import ExperimentManager

from sb3_ppo_ewma.zoo.patches._replace import AnyFunction, replace_function, upstream_source


def is_needed() -> bool:
    """:return: whether upstream tests the truth of the trial's number"""
    return "and self.trial_id:" in upstream_source(ExperimentManager.read_hyperparameters)


def apply() -> None:
    """Load every trial that has a number, and refuse a number without a study."""
    replace_function(ExperimentManager, "read_hyperparameters", _read_hyperparameters)


def _read_hyperparameters(upstream: AnyFunction, manager: Any) -> Any:
    if manager.trial_id is None:
        return upstream(manager)
    if not (manager.storage and manager.study_name):
        raise ValueError(f"--trial-id {manager.trial_id} needs --storage and --study-name")
    trial = manager.load_trial(manager.storage, manager.study_name, manager.trial_id)
    trial_id, given = manager.trial_id, manager.custom_hyperparams
    # Without a number, upstream applies only the hyper-parameters of the command line, which override the trial.
    manager.trial_id, manager.custom_hyperparams = None, {**trial, **(given or {})}
    try:
        return upstream(manager)
    finally:
        manager.trial_id, manager.custom_hyperparams = trial_id, given
