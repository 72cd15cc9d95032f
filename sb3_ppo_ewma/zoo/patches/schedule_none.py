"""
``clip_range_vf: null``, the default of Stable-Baselines3's PPO, is refused in a file and on the command line.

Seen in rl_zoo3 2.9.2: "Invalid value for clip_range_vf: None". Source:
``ExperimentManager._preprocess_schedules`` in
https://github.com/DLR-RM/rl-baselines3-zoo/blob/master/rl_zoo3/exp_manager.py.
"""

from typing import Any

from rl_zoo3.exp_manager import ExperimentManager

from sb3_ppo_ewma.zoo.patches._replace import AnyFunction, replace_function


def is_needed() -> bool:
    """:return: whether a schedule of ``None`` is refused"""
    try:
        ExperimentManager._preprocess_schedules({"clip_range_vf": None})
    except ValueError:
        return True
    return False


def apply() -> None:
    """Pass ``None`` on to the constructor."""
    replace_function(ExperimentManager, "_preprocess_schedules", _preprocess_schedules)


def _preprocess_schedules(upstream: AnyFunction, hyperparams: dict[str, Any]) -> dict[str, Any]:
    absent = [name for name, value in hyperparams.items() if value is None]
    given = {name: value for name, value in hyperparams.items() if value is not None}
    return {**upstream(given), **dict.fromkeys(absent)}
