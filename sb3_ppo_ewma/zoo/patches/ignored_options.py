"""
``--storage`` and ``--study-name`` without ``--trial-id`` are ignored, and so is ``-optimize`` beside ``-i``.

Seen in rl_zoo3 2.9.2. ``ExperimentManager.read_hyperparameters`` loads a trial only if all three are given, as reported
in https://github.com/DLR-RM/rl-baselines3-zoo/issues/498; ``setup_experiment`` tests for an agent first. Source:
https://github.com/DLR-RM/rl-baselines3-zoo/blob/master/rl_zoo3/exp_manager.py.
"""

from typing import Any

from rl_zoo3.exp_manager import ExperimentManager

from sb3_ppo_ewma.zoo.patches._replace import AnyFunction, replace_function, upstream_source


def is_needed() -> bool:
    """:return: whether upstream loads a trial only if all three options are given"""
    return "if self.storage and self.study_name and" in upstream_source(ExperimentManager.read_hyperparameters)


def apply() -> None:
    """Raise a ``ValueError`` for options that would have no effect."""
    replace_function(ExperimentManager, "read_hyperparameters", _read_hyperparameters)


def _read_hyperparameters(upstream: AnyFunction, manager: Any) -> Any:
    given = {"--storage": manager.storage, "--study-name": manager.study_name}
    options = " and ".join(name for name, value in given.items() if value is not None)
    if options and manager.trial_id is None and not manager.optimize_hyperparameters:
        raise ValueError(
            f"without -optimize, which searches, {options} needs --trial-id, the number of the trial to train"
        )
    if manager.optimize_hyperparameters and manager.trained_agent:
        raise ValueError("-optimize searches with new agents, -i continues to train one: give one of the two")
    return upstream(manager)
