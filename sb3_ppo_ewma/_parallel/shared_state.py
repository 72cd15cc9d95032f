"""What the process that trains and the process that collects both have, and both may change."""

import copy
from collections import deque
from typing import Any, NamedTuple, cast

import numpy as np
import torch as th
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper

from sb3_ppo_ewma._arguments import warn_caller
from sb3_ppo_ewma._parallel.channel import dumps
from sb3_ppo_ewma._parallel.normalization import Statistics, set_statistics, statistics_of

_SIMPLE = (bool, int, float, str, type(None), np.generic)
_CONTAINERS = (list, tuple, deque, dict, set, frozenset)
# Arrays and containers are copied and compared if they are not larger; an entry counts as 100 bytes
_MOST_BYTES, _BYTES_OF_ENTRY, _MOST_LEVELS = 2**20, 100, 8
# Attributes that collection carries from one rollout to the next
COLLECTION_STATE = ("_last_obs", "_last_episode_starts", "_last_lstm_states", "_last_original_obs")
# Attributes that each process has for itself
_OWN_ATTRIBUTES = {
    *COLLECTION_STATE,
    *("num_timesteps", "ep_info_buffer", "ep_success_buffer"),
    *("pos", "full", "generator_ready"),
    *("waiting", "closed"),
    *("venv", "class_attributes", "reset_infos", "_seeds", "_options", "old_obs", "old_reward", "obs_rms", "ret_rms"),
}
_STATISTICS = ("environments", "running statistics")


class Change(NamedTuple):
    """
    A changed attribute.

    :param value: its value
    :param is_in_place: whether it is the object of before, with other content
    """

    value: Any
    is_in_place: bool


class Changes(NamedTuple):
    """
    What one process has changed.

    :param attributes: changed attributes of the algorithm, of its rollout buffer and of its environments, by depth
    :param statistics: running statistics of a ``VecNormalize``; ``None``: as before
    :param number: of these changes, from 1
    :param knows: number of the other process's last changes that this one knew of
    """

    attributes: dict[str, dict[str, Change]]
    statistics: Statistics | None
    number: int
    knows: int


class _Known(NamedTuple):
    """
    An attribute at the last exchange.

    :param value: its value
    :param is_copied: whether other content is a change, else only another object is
    :param content: copy of the value, of a network its tensors by name, if it is copied
    """

    value: Any
    is_copied: bool
    content: Any


class SharedState:
    """
    Attributes that a process tells the other one about: numbers, strings and switches of an algorithm, its rollout
    buffer and its environments; of algorithm and wrappers also arrays and containers of these; and running statistics.

    :param model: the algorithm
    :param with_innermost: whether the attributes of the innermost environments belong to it
    :param prevails: whether what this process sets stays if the other one changes it before it knows, and whether other
        objects that are set as attributes of wrappers belong to it
    """

    def __init__(self, model: Any, with_innermost: bool, prevails: bool) -> None:
        self._with_innermost, self._prevails = with_innermost, prevails
        self._known = self._attributes(model)
        self._statistics = _statistics(model)
        # Number of the last changes of this process, of the other one, and by owner and name of those with an attribute
        self._number = self._taken = 0
        self._sent: dict[tuple[str, str], int] = {}
        self._warned: set[tuple[str, str]] = set()

    def changes(self, model: Any) -> Changes:
        """
        :param model: the algorithm
        :return: what has changed here since the last call; the other process must take it
        :raises TypeError: if an object that was set as an attribute cannot be pickled
        """
        known, statistics = self._attributes(model), _statistics(model)
        attributes = {owner: _changed(self._known[owner], now) for owner, now in known.items()}
        has_statistics = not _are_equal(statistics, self._statistics)
        self._known, self._statistics = known, statistics
        self._number += 1
        self._sent |= {(owner, name): self._number for owner, changed in attributes.items() for name in changed}
        if has_statistics:
            self._sent[_STATISTICS] = self._number
        return Changes(attributes, statistics if has_statistics else None, self._number, self._taken)

    def take(self, model: Any, changes: Changes) -> None:
        """
        :param model: the algorithm
        :param changes: from the other process
        """
        self._taken = changes.number
        owners = _owners(model)
        for owner, changed in changes.attributes.items():
            attributes = vars(owners[owner])
            for name, change in changed.items():
                if not self._prevails_over(changes, owner, name, owners[owner]):
                    _put(attributes, name, change)
                    self._known[owner][name] = _known(attributes[name])
        venv, statistics = model.get_vec_normalize_env(), changes.statistics
        if venv is not None and statistics is not None and not self._prevails_over(changes, *_STATISTICS, venv):
            set_statistics(venv, statistics)
            self._statistics = statistics

    def _prevails_over(self, changes: Changes, owner: str, name: str, holder: Any) -> bool:
        if not self._prevails or self._sent.get((owner, name), 0) <= changes.knows:
            return False
        if (owner, name) not in self._warned:
            self._warned.add((owner, name))
            warn_caller(
                f"{name!r} of {type(holder).__name__} was set here while the process that collects rollouts, which is "
                "ahead (max_policy_lag), has changed it, too. What was set here replaces those changes"
            )
        return True

    def forget(self) -> None:
        """Let the next changes have everything, as the other process has gone on with its own."""
        self._statistics = None
        self._known = {
            owner: {name: each for name, each in known.items() if not each.is_copied}
            for owner, known in self._known.items()
        }

    def _attributes(self, model: Any) -> dict[str, dict[str, _Known]]:
        owners = _owners(model)
        innermost = list(owners)[-1]
        if not self._with_innermost:
            del owners[innermost]
        simple = {"buffer", innermost}
        return {owner: self._attributes_of(each, owner, owner in simple) for owner, each in owners.items()}

    def _attributes_of(self, holder: Any, owner: str, is_simple: bool) -> dict[str, _Known]:
        found = {}
        for name, value in vars(holder).items():
            if name in _OWN_ATTRIBUTES or (is_simple and not isinstance(value, _SIMPLE)) or _is_method(holder, name):
                continue
            if owner == "model" and name == "policy":  # is sent in its own way
                continue
            known = _known(value)
            if known.is_copied or (self._prevails and owner != "model"):
                found[name] = known
        return found


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


def _is_method(owner: Any, name: str) -> bool:
    return name.startswith("__") or callable(getattr(type(owner), name, None))


def _known(value: Any) -> _Known:
    if isinstance(value, th.nn.Module):
        return _Known(value, True, {name: tensor.detach().cpu().clone() for name, tensor in _tensors(value).items()})
    is_copied = _size(value) <= _MOST_BYTES
    return _Known(value, is_copied, copy.deepcopy(value) if is_copied else None)


def _tensors(network: th.nn.Module) -> dict[str, th.Tensor]:
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def _size(value: Any, level: int = 0) -> float:
    """
    :param value: anything
    :param level: in how many containers it is
    :return: about how many bytes it takes, infinitely many if it is more than numbers, strings, arrays and containers
    """
    if isinstance(value, _SIMPLE):
        return len(value) if isinstance(value, str) else 0
    if type(value) is np.ndarray:
        return np.inf if value.dtype.hasobject else value.nbytes
    is_small = isinstance(value, _CONTAINERS) and level < _MOST_LEVELS and len(value) * _BYTES_OF_ENTRY <= _MOST_BYTES
    if not is_small:
        return np.inf
    entries = [*value, *value.values()] if isinstance(value, dict) else value
    return sum((_size(each, level + 1) for each in entries), start=len(value) * _BYTES_OF_ENTRY)


def _changed(before: dict[str, _Known], known: dict[str, _Known]) -> dict[str, Change]:
    """
    :param before: an object's attributes at the last exchange
    :param known: its attributes now
    :return: those that have changed
    :raises TypeError: if one of them cannot be pickled
    """
    changed = {}
    for name, now in known.items():
        old = before.get(name)
        is_same_object = old is not None and old.value is now.value
        if old is None or not (old.is_copied and now.is_copied):
            has_changed = not is_same_object
        else:
            has_changed = _differ(old.content, now.content)
            if isinstance(now.value, th.nn.Module):
                is_same_object = is_same_object and _shapes(old.content) == _shapes(now.content)
        if has_changed:
            changed[name] = Change(_sendable(name, now, is_same_object), is_in_place=is_same_object)
    return changed


def _sendable(name: str, now: _Known, is_in_place: bool) -> Any:
    """
    :param name: of an attribute
    :param now: the attribute
    :param is_in_place: whether the other process has the same object, with other content
    :return: what to send of it
    :raises TypeError: if it cannot be pickled
    """
    is_network = isinstance(now.value, th.nn.Module)
    if now.is_copied and (is_in_place or not is_network):
        return now.content
    try:
        value = copy.deepcopy(now.value).cpu() if is_network else now.value
        dumps(value)
    except Exception as error:
        raise TypeError(f"{name}={now.value!r} cannot be sent to the process with the environments: {error}") from None
    return value


def _shapes(tensors: dict[str, th.Tensor]) -> dict[str, Any]:
    return {name: (each.shape, each.dtype) for name, each in tensors.items()}


def _differ(a: Any, b: Any) -> bool:
    if a is b:  # NaN is the same as itself
        return False
    if type(a) is not type(b):
        return True
    if isinstance(a, th.Tensor):
        return a.dtype != b.dtype or not th.equal(a, b)
    if isinstance(a, np.ndarray):
        is_equal = a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind in "fcmM")
        return not is_equal
    if isinstance(a, dict):
        return a.keys() != b.keys() or any(_differ(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple, deque)):
        return len(a) != len(b) or any(map(_differ, a, b))
    return bool(a != b)


def _put(attributes: dict[str, Any], name: str, change: Change) -> None:
    """
    :param attributes: of an object
    :param name: of one of them
    :param change: how another process has changed it
    """
    value, present = change.value, cast(Any, attributes.get(name))
    if change.is_in_place and isinstance(present, th.nn.Module):
        with th.no_grad():
            for key, tensor in _tensors(present).items():
                tensor.copy_(value[key])
        return
    can_be_changed = change.is_in_place and type(present) is type(value)
    if (
        can_be_changed
        and isinstance(value, np.ndarray)
        and (present.shape, present.dtype) == (value.shape, value.dtype)
    ):
        present[...] = value
    elif can_be_changed and isinstance(value, (list, deque)):
        present.clear()
        present.extend(value)
    elif can_be_changed and isinstance(value, (dict, set)):
        present.clear()
        present.update(value)
    else:
        attributes[name] = value


def _statistics(model: Any) -> Statistics | None:
    venv = model.get_vec_normalize_env()
    return None if venv is None else statistics_of(venv)


def _are_equal(a: Statistics | None, b: Statistics | None) -> bool:
    if a is None or b is None:
        return a is b
    if a.keys() != b.keys():
        return False
    return all(np.array_equal(cast(Any, x), cast(Any, y)) for name in a for x, y in zip(a[name], b[name], strict=True))
