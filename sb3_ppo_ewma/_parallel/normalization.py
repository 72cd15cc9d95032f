"""Running statistics of a ``VecNormalize``: read, set, and pooled over processes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecNormalize

# (mean, variance, count) by name
Statistics = Mapping[str, tuple[np.ndarray, np.ndarray, float]]


def statistics_of(venv: VecNormalize) -> Statistics:
    """
    :param venv: environments with normalised observations or rewards
    :return: running statistics of the returns and, if ``norm_obs``, of the observations
    """
    return {name: (each.mean.copy(), each.var.copy(), each.count) for name, each in _running(venv).items()}


def set_statistics(venv: VecNormalize, statistics: Statistics) -> None:
    """
    :param venv: environments with normalised observations or rewards
    :param statistics: running statistics for it, from environments with the same spaces
    """
    for name, each in _running(venv).items():
        mean, variance, each.count = statistics[name]
        each.mean, each.var = mean.copy(), variance.copy()


def _running(venv: VecNormalize) -> dict[str, RunningMeanStd]:
    found = {"returns": venv.ret_rms}
    if venv.norm_obs:
        observations: Any = venv.obs_rms
        found |= observations if isinstance(observations, dict) else {"observations": observations}
    return found


def pooled(before: Statistics, by_process: Sequence[Statistics]) -> Statistics:
    """
    :param before: the statistics from which every process started
    :param by_process: the statistics of each process now
    :return: the statistics that one process would have after the data of all of them
    """
    return {name: _pooled(before[name], [each[name] for each in by_process]) for name in before}


def _pooled(before: Any, states: Sequence[Any]) -> Any:
    mean_before, variance_before, count_before = before
    n_others = len(states) - 1
    count = sum(count for _, _, count in states) - n_others * count_before
    # About the old mean, so that nothing cancels
    shift = sum(count * (mean - mean_before) for mean, _, count in states) / count
    squares = sum(count * (variance + (mean - mean_before) ** 2) for mean, variance, count in states)
    squares = squares - n_others * count_before * variance_before
    return mean_before + shift, np.maximum(squares / count - shift**2, 0.0), count
