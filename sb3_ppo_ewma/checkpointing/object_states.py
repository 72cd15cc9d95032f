"""
The state of an environment, or of another Python object, as plain data: all that its attributes hold, followed through
containers and objects. It is put into another object of the same kind, which was built in the usual way, so that
nothing in a file names what to run. What is not understood is refused, by the path to it.
"""

import datetime
import enum
import functools
import io
import logging
import pathlib
import random
import re
import sys
import threading
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium.envs.registration import EnvSpec
from stable_baselines3.common.vec_env.base_vec_env import VecEnvWrapper

from sb3_ppo_ewma.checkpointing.plain_data import dumps
from sb3_ppo_ewma.checkpointing.simulator_states import SIMULATORS, UnknownStateError

# What a program has and a state does not change: compared by name
_CONSTANTS = (
    type,
    types.ModuleType,
    types.BuiltinFunctionType,
    np.ufunc,
    np.dtype,
    logging.Logger,
    io.IOBase,
    EnvSpec,
    weakref.ref,
    type(threading.Lock()),
    type(threading.RLock()),
)
# Values that cannot change: compared by their text
_VALUES = (complex, range, slice, re.Pattern, pathlib.PurePath, datetime.date, datetime.timedelta, type(Ellipsis))
_CONSTANT_NAMES = {"_csv:writer", "csv:DictWriter"}
# What belongs to this process alone
_OF_PROCESS = ("multiprocessing.", "subprocess:", "socket:", "threading:", "concurrent.", "asyncio.", "_thread:")
_MAPPINGS = {dict: "dict", OrderedDict: "OrderedDict"}
_SEQUENCES: dict[type, str] = {list: "list", set: "set", frozenset: "frozenset", deque: "deque"}
_BIT_GENERATORS = {"PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64"}
# Packages whose classes are not made from a name in a file
_BUILT_ONLY = {"gymnasium", "stable_baselines3", "sb3_contrib", "sb3_ppo_ewma", "numpy", "torch"}
_MISSING: Any = object()


class _WithDict:
    pass


# === Reading ===


def state_of(root: Any, name: str = "env", without: Any = None) -> Any:
    """
    :param root: an environment or another Python object
    :param name: how messages call it
    :param without: an object in it that is left as it is
    :return: its state, for :func:`~sb3_ppo_ewma.checkpointing.plain_data.dumps`
    :raises UnknownStateError: naming the first attribute that cannot be read as plain data
    """
    return _Reader(without).read(root, name)


class _Reader:
    """
    Each object is read once; where it comes up again, its number stands.

    :param without: an object that is left as it is
    """

    def __init__(self, without: Any) -> None:
        self._without = without
        self._seen: list[Any] = []
        self._numbers: dict[int, int] = {}

    def read(self, value: Any, path: str) -> Any:
        if value is None or type(value) in (bool, int, float, str, bytes) or isinstance(value, np.generic):
            return value
        if isinstance(value, enum.Enum):
            return {"kind": "enum", "class": _name(type(value)), "value": self.read(value.value, path)}
        name = _name(type(value))
        if isinstance(value, (*_CONSTANTS, *_VALUES)) or name in _CONSTANT_NAMES or (value is self._without):
            return {"kind": "constant", "name": _constant_name(value)}
        if id(value) in self._numbers:
            return {"kind": "same", "number": self._numbers[id(value)]}
        if isinstance(value, tuple | frozenset):  # Python itself decides which of them are the same object
            return self._content(value, path)
        self._numbers[id(value)] = len(self._seen)
        self._seen.append(value)  # which keeps its id from being used again
        return self._content(value, path)

    def _content(self, value: Any, path: str) -> Any:
        cls = type(value)
        if cls is types.FunctionType:
            cells = [self.read(cell.cell_contents, f"{path}()") for cell in value.__closure__ or ()]
            return {"kind": "function", "name": _constant_name(value), "cells": cells}
        if cls is types.MethodType:
            return {"kind": "method", "name": _constant_name(value), "self": self.read(value.__self__, path)}
        if cls is np.ndarray and not value.dtype.hasobject:
            return {"kind": "array", "value": value.copy()}
        if cls is th.Tensor:
            return {"kind": "tensor", "value": value.detach().cpu().numpy().copy()}
        if cls in _SEQUENCES:
            items = [self.read(each, f"{path}[{index}]") for index, each in enumerate(value)]
            return {"kind": _SEQUENCES[cls], "items": items, "maxlen": value.maxlen if cls is deque else None}
        if isinstance(value, tuple):
            items = [self.read(each, f"{path}[{index}]") for index, each in enumerate(value)]
            return {"kind": "tuple", "class": _name(cls), "items": items}
        if cls in _MAPPINGS:
            pairs = [[self.read(key, path), self.read(each, f"{path}[{key!r}]")] for key, each in value.items()]
            return {"kind": _MAPPINGS[cls], "items": pairs}
        if cls in (np.random.Generator, np.random.RandomState, random.Random):
            return {"kind": "generator", "class": _name(cls), "state": _generator_state(value)}
        if _name(cls) in SIMULATORS:
            return {"kind": "simulator", "class": _name(cls), "state": SIMULATORS[_name(cls)].read(value)}
        if has_own_state(value):
            own = self.read(value.get_state(), f"{path}.get_state()")
            return {"kind": "own", "class": _name(cls), "state": own}
        if not _is_plain_object(cls) or _name(cls).startswith(_OF_PROCESS):
            raise UnknownStateError(f"{path} is a {_name(cls).replace(':', '.')}")
        attributes = [[name, self.read(each, f"{path}.{name}")] for name, each in _attributes(value).items()]
        return {"kind": "object", "class": _name(cls), "attributes": attributes}


# === Writing ===


def restore_state(root: Any, state: Any, name: str = "env", without: Any = None) -> None:
    """
    Put a state into an object. If that cannot be done, the object stays as it is.

    :param root: an object of the same kind, after its first ``reset()``, if it is an environment
    :param state: from :func:`state_of`
    :param name: how messages call it
    :param without: an object in it that is left as it is
    :raises UnknownStateError: if the object differs from the one that the state was read from
    """
    writer = _Writer(_own_packages(root))
    if writer.value(state, root, name) is not root:
        raise UnknownStateError(f"{name} is another kind of object")
    for commit in writer.commits:
        commit()
    if dumps(state_of(root, name, without)) != dumps(state):
        raise UnknownStateError(f"{name} does not hold the state that it was given")


class _Writer:
    """
    :param packages: names of the packages whose classes may be made anew
    """

    def __init__(self, packages: set[str]) -> None:
        self._packages = packages
        self._values: list[Any] = []
        self.commits: list[Callable[[], None]] = []

    def value(self, state: Any, present: Any, path: str) -> Any:
        """
        :param state: of a value
        :param present: what is there now
        :param path: to it
        :return: the value, complete after all commits
        """
        if not isinstance(state, dict):
            return state
        kind = state["kind"]
        if kind == "same":
            return self._values[state["number"]]
        if kind == "constant":
            if present is _MISSING or _constant_name(present) != state["name"]:
                raise UnknownStateError(f"{path} was {state['name']}")
            return present
        if kind == "enum":
            return self._class(state["class"], present, path)(self.value(state["value"], None, path))
        if kind == "tuple":
            return self._tuple(state, present, path)
        if kind == "frozenset":
            return frozenset(self.value(each, _MISSING, path) for each in state["items"])
        number = len(self._values)
        self._values.append(_MISSING)
        result = getattr(self, f"_{kind}", self._container)(state, present, path, number)
        self._values[number] = result
        return result

    def _class(self, name: str, present: Any, path: str) -> Any:
        if _name(type(present)) == name:
            return type(present)
        module, _, qualname = name.partition(":")
        found: Any = sys.modules.get(module)
        for part in qualname.split("."):
            found = getattr(found, part, None)
        known = module.partition(".")[0] in self._packages and isinstance(found, type)
        if not known or not (issubclass(found, enum.Enum) or _is_plain_object(found)):
            raise UnknownStateError(f"{path} was a {name.replace(':', '.')}")
        return found

    def _array(self, state: Any, present: Any, path: str, number: int) -> Any:
        return state["value"].copy()

    def _tensor(self, state: Any, present: Any, path: str, number: int) -> Any:
        device = present.device if isinstance(present, th.Tensor) else "cpu"
        return th.as_tensor(state["value"].copy(), device=device)

    def _tuple(self, state: Any, present: Any, path: str) -> Any:
        there = present if isinstance(present, tuple) else ()
        items = [self.value(each, _at(there, index), f"{path}[{index}]") for index, each in enumerate(state["items"])]
        if state["class"] == "builtins:tuple":
            return tuple(items)
        return self._class(state["class"], present, path)._make(items)

    def _container(self, state: Any, present: Any, path: str, number: int) -> Any:
        items = state["items"]
        if state["kind"] in _MAPPINGS.values():
            result: Any = OrderedDict() if state["kind"] == "OrderedDict" else {}
            self._values[number] = result
            there = present if isinstance(present, dict) else {}
            for key, each in items:
                own = self.value(key, None, path)
                result[own] = self.value(each, there.get(own, _MISSING), f"{path}[{own!r}]")
            return result
        result = deque(maxlen=state["maxlen"]) if state["kind"] == "deque" else []
        self._values[number] = result
        ordered = present if isinstance(present, list | deque) else ()
        result.extend(self.value(each, _at(ordered, i), f"{path}[{i}]") for i, each in enumerate(items))
        return set(result) if state["kind"] == "set" else result

    def _function(self, state: Any, present: Any, path: str, number: int) -> Any:
        if type(present) is not types.FunctionType or _constant_name(present) != state["name"]:
            raise UnknownStateError(f"{path} was {state['name']}")
        self._values[number] = present
        for cell, each in zip(present.__closure__ or (), state["cells"], strict=True):
            content = self.value(each, cell.cell_contents, f"{path}()")
            self.commits.append(functools.partial(setattr, cell, "cell_contents", content))
        return present

    def _method(self, state: Any, present: Any, path: str, number: int) -> Any:
        owner = getattr(present, "__self__", _MISSING)
        is_same = type(present) is types.MethodType and _constant_name(present) == state["name"]
        if not is_same or self.value(state["self"], owner, path) is not owner:
            raise UnknownStateError(f"{path} was {state['name']}")
        return present

    def _generator(self, state: Any, present: Any, path: str, number: int) -> Any:
        kind, content = state["class"], state["state"]
        if kind == "random:Random":
            made: Any = random.Random()
        elif content["bit_generator"] in _BIT_GENERATORS:
            bits = getattr(np.random, content["bit_generator"])()
            made = np.random.RandomState(bits) if "RandomState" in kind else np.random.Generator(bits)
        else:
            raise UnknownStateError(f"{path} drew from {content['bit_generator']}")
        is_same = type(present) is type(made) and _bits(present) == _bits(made)
        target = present if is_same else made  # others may have the same generator
        self.commits.append(lambda: _set_generator_state(target, content))
        return target

    def _simulator(self, state: Any, present: Any, path: str, number: int) -> Any:
        if present is _MISSING or _name(type(present)) != state["class"]:
            raise UnknownStateError(f"{path} was a {state['class'].replace(':', '.')}")
        read, write = SIMULATORS[state["class"]]
        if write is not None:
            self.commits.append(functools.partial(write, present, state["state"]))
        elif read(present) != state["state"]:
            raise UnknownStateError(f"{path} was another one")
        return present

    def _own(self, state: Any, present: Any, path: str, number: int) -> Any:
        if _name(type(present)) != state["class"]:
            raise UnknownStateError(f"{path} was a {state['class'].replace(':', '.')}")
        own = self.value(state["state"], None, f"{path}.get_state()")
        self.commits.append(lambda: present.set_state(own))
        return present

    def _object(self, state: Any, present: Any, path: str, number: int) -> Any:
        cls = self._class(state["class"], present, path)
        target = present if type(present) is cls else object.__new__(cls)
        self._values[number] = target
        there = _attributes(target)
        new = {
            name: self.value(each, there.get(name, _MISSING), f"{path}.{name}") for name, each in state["attributes"]
        }
        self.commits.append(lambda: _set_attributes(target, new))
        return target


def has_own_state(value: Any) -> bool:
    """
    :param value: an environment, or anything else
    :return: whether its class says itself what its state is, with methods ``get_state()`` and ``set_state(state)``
    """
    found = [getattr(type(value), name, None) for name in ("get_state", "set_state")]
    counts = [getattr(getattr(each, "__code__", None), "co_argcount", None) for each in found]
    return counts == [1, 2]


def _at(values: Any, index: int) -> Any:
    return values[index] if index < len(values) else _MISSING


def _name(cls: type) -> str:
    return f"{getattr(cls, '__module__', None)}:{cls.__qualname__}"  # types made in C may have no module


def _constant_name(value: Any) -> str:
    if isinstance(value, np.dtype):
        return f"numpy.dtype {value.str}"
    if isinstance(value, _VALUES):
        return repr(value)
    if isinstance(value, types.FunctionType):
        return f"{value.__module__}:{value.__qualname__} in line {value.__code__.co_firstlineno}"
    if isinstance(value, type):
        return _name(value)
    if isinstance(value, logging.Logger | types.ModuleType):
        return f"{type(value).__name__} {getattr(value, 'name', None) or value.__name__}"  # type: ignore[union-attr]
    qualname = getattr(value, "__qualname__", None)
    return f"{getattr(value, '__module__', None)}:{qualname}" if qualname else _name(type(value))


def _is_plain_object(cls: type) -> bool:
    """
    :param cls: a class
    :return: whether all that its instances hold is in their attributes
    """
    slots = list(_slots(cls))
    has_references = any("__weakref__" in vars(base) for base in cls.__mro__)
    size = _WithDict.__basicsize__ - (0 if has_references else 8) + 8 * len(slots)
    is_python = all(base is object or "__dict__" in vars(base) or "__slots__" in vars(base) or _bare(base)
                    for base in cls.__mro__)  # fmt: skip
    return is_python and cls is not object and cls.__basicsize__ <= size and cls.__itemsize__ == 0


def _bare(cls: type) -> bool:
    # A Python class derived from another one with a dictionary has none of its own.
    return "__module__" in vars(cls) and any("__dict__" in vars(base) for base in cls.__mro__[1:])


def _slots(cls: type) -> Iterator[str]:
    for base in cls.__mro__:
        names = vars(base).get("__slots__", ())
        yield from (each for each in ([names] if isinstance(names, str) else names) if not each.startswith("__"))


def _attributes(value: Any) -> dict[str, Any]:
    slots = {name: getattr(value, name) for name in _slots(type(value)) if hasattr(value, name)}
    own = {name: each for name, each in getattr(value, "__dict__", {}).items() if not _is_of_class(value, name)}
    return {**slots, **own}


def _set_attributes(target: Any, new: dict[str, Any]) -> None:
    slots = set(_slots(type(target)))
    for name in slots & new.keys():
        object.__setattr__(target, name, new[name])
    if hasattr(target, "__dict__"):
        kept = {name: each for name, each in vars(target).items() if _is_of_class(target, name)}
        vars(target).clear()
        vars(target).update({**{name: each for name, each in new.items() if name not in slots}, **kept})


def _is_of_class(value: Any, name: str) -> bool:
    return name == "class_attributes" and isinstance(value, VecEnvWrapper)


def _own_packages(root: Any) -> set[str]:
    names, layer = set(), root
    while layer is not None:
        names |= {cls.__module__.partition(".")[0] for cls in type(layer).__mro__}
        layer = layer.env if isinstance(layer, gym.Wrapper) else None
    return names - _BUILT_ONLY - set(sys.stdlib_module_names)


# === Generators of random numbers ===


def _bits(generator: Any) -> str:
    if isinstance(generator, random.Random):
        return ""
    return str(_generator_state(generator)["bit_generator"])


def _generator_state(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    return generator.bit_generator.state


def _set_generator_state(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(state)
    else:
        generator.bit_generator.state = state
