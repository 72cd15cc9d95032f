"""What the process that trains and the process that collects both have, and both may change."""

from typing import Any, NamedTuple, cast

import numpy as np
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper

from sb3_ppo_ewma._parallel.normalization import Statistics, set_statistics, statistics_of

# Attributes of these types, but for some that each process has for itself
_SIMPLE = (bool, int, float, str, type(None), np.generic)
# Attributes that collection carries from one rollout to the next
COLLECTION_STATE = ("_last_obs", "_last_episode_starts", "_last_lstm_states", "_last_original_obs")
_OWN_ATTRIBUTES = {"num_timesteps", "pos", "full", "generator_ready", "waiting", "closed", *COLLECTION_STATE}


class Changes(NamedTuple):
    """
    What one process has changed.

    :param attributes: changed attributes of the algorithm, of its rollout buffer and of its environments, by depth
    :param statistics: running statistics of a ``VecNormalize``; ``None``: as before
    """

    attributes: dict[str, dict[str, Any]]
    statistics: Statistics | None


class SharedState:
    """
    Numbers, strings and switches of an algorithm, its rollout buffer and its environments, and running statistics.

    :param model: the algorithm
    :param with_innermost: whether the attributes of the innermost environments belong to it
    """

    def __init__(self, model: Any, with_innermost: bool) -> None:
        self._with_innermost = with_innermost
        self._known = self._attributes(model)
        self._statistics = _statistics(model)

    def changes(self, model: Any) -> Changes:
        """
        :param model: the algorithm
        :return: what has changed here since the last call
        """
        before, self._known = self._known, self._attributes(model)
        changed = {
            owner: {name: value for name, value in now.items() if name not in old or _differ(old[name], value)}
            for (owner, now), old in zip(self._known.items(), before.values(), strict=True)
        }
        statistics, known = _statistics(model), self._statistics
        self._statistics = statistics
        attributes = {owner: each for owner, each in changed.items() if each}
        return Changes(attributes, None if _are_equal(statistics, known) else statistics)

    def take(self, model: Any, changes: Changes) -> None:
        """
        :param model: the algorithm
        :param changes: from the other process
        """
        owners = _owners(model)
        for owner, changed in changes.attributes.items():
            vars(owners[owner]).update(changed)
            self._known.get(owner, {}).update(changed)
        venv = model.get_vec_normalize_env()
        if venv is not None and changes.statistics is not None:
            set_statistics(venv, changes.statistics)
            self._statistics = changes.statistics

    def forget_statistics(self) -> None:
        """Let the next changes have the statistics in any case, as the other process has gone on with its own."""
        self._statistics = None

    def _attributes(self, model: Any) -> dict[str, dict[str, Any]]:
        owners = _owners(model)
        if not self._with_innermost:
            owners.popitem()
        return {
            owner: {
                name: value
                for name, value in vars(each).items()
                if isinstance(value, _SIMPLE) and name not in _OWN_ATTRIBUTES
            }
            for owner, each in owners.items()
        }


def layers(env: VecEnv) -> list[Any]:
    """
    :param env: environments
    :return: the environments themselves, what they wrap, and so on to the innermost
    """
    found: list[Any] = [env]
    while isinstance(found[-1], VecEnvWrapper):
        found.append(found[-1].venv)
    return found


def _owners(model: Any) -> dict[str, Any]:
    """
    :param model: the algorithm
    :return: by name, whose attributes are shared; the innermost environments are the last
    """
    return {
        "model": model,
        "buffer": model.rollout_buffer,
        **{str(depth): layer for depth, layer in enumerate(layers(model.env))},
    }


def _differ(a: Any, b: Any) -> bool:
    return a is not b and (type(a) is not type(b) or bool(a != b))  # NaN is the same as itself


def _statistics(model: Any) -> Statistics | None:
    venv = model.get_vec_normalize_env()
    return None if venv is None else statistics_of(venv)


def _are_equal(a: Statistics | None, b: Statistics | None) -> bool:
    if a is None or b is None:
        return a is b
    if a.keys() != b.keys():
        return False
    return all(np.array_equal(cast(Any, x), cast(Any, y)) for name in a for x, y in zip(a[name], b[name], strict=True))
