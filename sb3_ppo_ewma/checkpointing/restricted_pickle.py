"""
Read pickles without running anything that they ask for: a machine of its own for pickle's opcodes, which knows an exact
list of classes of SB3, sb3-contrib, Gymnasium, NumPy, PyTorch and this package.

Python's own reader calls whatever a pickle names. This one never does: it makes the few kinds of objects on its list by
itself, from checked arguments, and takes all other names on the list for what they are, classes that cannot be called.
"""

import importlib
import pathlib
import pickletools
import re
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule

# Modules and the classes of them that a pickle may name, but neither call nor change
_CLASSES = {
    "numpy": "ndarray bool_ int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64",
    "numpy.random._mt19937": "MT19937",
    "numpy.random._pcg64": "PCG64 PCG64DXSM",
    "numpy.random._philox": "Philox",
    "numpy.random._sfc64": "SFC64",
    "numpy.random.bit_generator": "SeedSequence",
    "rl_zoo3.utils": "SimpleLinearSchedule",
    "sb3_contrib.common.maskable.buffers": "MaskableRolloutBuffer MaskableDictRolloutBuffer",
    "sb3_contrib.common.maskable.policies": "MaskableActorCriticPolicy MaskableActorCriticCnnPolicy "
    "MaskableMultiInputActorCriticPolicy",
    "sb3_contrib.common.recurrent.buffers": "RecurrentRolloutBuffer RecurrentDictRolloutBuffer",
    "sb3_contrib.common.recurrent.policies": "RecurrentActorCriticPolicy RecurrentActorCriticCnnPolicy "
    "RecurrentMultiInputActorCriticPolicy",
    "sb3_ppo_ewma.contrib.masking": "MaskableRecurrentRolloutBuffer MaskableRecurrentDictRolloutBuffer",
    "sb3_ppo_ewma.contrib.policies": "MaskableRecurrentActorCriticPolicy MaskableRecurrentActorCriticCnnPolicy "
    "MaskableRecurrentMultiInputActorCriticPolicy MaskablePPGPolicy MaskablePPGCnnPolicy MaskablePPGMultiInputPolicy "
    "RecurrentPPGPolicy RecurrentPPGCnnPolicy RecurrentPPGMultiInputPolicy MaskableRecurrentPPGPolicy "
    "MaskableRecurrentPPGCnnPolicy MaskableRecurrentPPGMultiInputPolicy",
    "sb3_ppo_ewma.networks": "ImpalaCNN SmallGridCNN",
    "sb3_ppo_ewma.policies": "ImpalaPolicy PPGPolicy PPGCnnPolicy PPGMultiInputPolicy PPGImpalaPolicy",
    "stable_baselines3.common.buffers": "RolloutBuffer DictRolloutBuffer",
    "stable_baselines3.common.policies": "ActorCriticPolicy ActorCriticCnnPolicy MultiInputActorCriticPolicy",
    "stable_baselines3.common.sb2_compat.rmsprop_tf_like": "RMSpropTFLike",
    "stable_baselines3.common.torch_layers": "FlattenExtractor NatureCNN CombinedExtractor",
    "torch.nn.modules.activation": "ReLU Tanh ELU LeakyReLU SiLU GELU Mish Sigmoid SELU CELU ReLU6 PReLU RReLU "
    "Hardtanh Hardswish Hardsigmoid LogSigmoid Softplus Softsign Softshrink Tanhshrink",
    "torch.nn.modules.linear": "Identity",
    "torch.optim.adadelta": "Adadelta",
    "torch.optim.adagrad": "Adagrad",
    "torch.optim.adam": "Adam",
    "torch.optim.adamax": "Adamax",
    "torch.optim.adamw": "AdamW",
    "torch.optim.asgd": "ASGD",
    "torch.optim.nadam": "NAdam",
    "torch.optim.radam": "RAdam",
    "torch.optim.rmsprop": "RMSprop",
    "torch.optim.rprop": "Rprop",
    "torch.optim.sgd": "SGD",
}
_SPACES = (spaces.Box, spaces.Dict, spaces.Discrete, spaces.MultiBinary, spaces.MultiDiscrete, spaces.Tuple)
_SCHEDULE_ATTRIBUTES = {
    "ConstantSchedule": {"val"},
    "LinearSchedule": {"start", "end", "end_fraction"},
    "SimpleLinearSchedule": {"initial_value"},
}
_BIT_GENERATORS = {
    cls.__name__: cls
    for cls in (np.random.MT19937, np.random.PCG64, np.random.PCG64DXSM, np.random.Philox, np.random.SFC64)
}
# Booleans, numbers and text, without Python objects
_DTYPE = re.compile(r"[?]|[biufcSU]\d{1,5}")
_NATIVE = ("|", "=", "<" if sys.byteorder == "little" else ">")
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, type] = {"EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_DICT": dict, "EMPTY_SET": set}

Maker: TypeAlias = Callable[..., Any]


class NotAllowedError(ValueError):
    """A pickle needs what is not on the list. The message names it."""


def loads(pickled: bytes) -> Any:
    """
    :param pickled: a pickle, from anybody
    :return: the object
    :raises NotAllowedError: if the pickle needs a class, a function or an opcode that is not on the list
    :raises ValueError: if it is damaged
    """
    try:
        return _Machine().run(pickled)
    except NotAllowedError:
        raise
    except Exception as error:  # opcodes in any order provoke almost any error
        raise ValueError(f"damaged ({type(error).__name__}: {error})") from error


class _Machine:
    """Pickle's stack machine, of protocols 2 to 5."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stacks below the marks
        self._memo: dict[int, Any] = {}

    def run(self, pickled: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(pickled):
            if opcode.name == "STOP":
                (value,) = self._stack
                return value
            self._step(opcode.name, argument)
        raise ValueError("no end")

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name == "MARK":
            self._below.append(stack)
            self._stack = []
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(reversed([stack.pop() for _ in range(int(name[-1]))])))
        elif name == "GLOBAL":
            stack.append(named(*argument.split(" ", 1)))
        elif name not in ("PROTO", "FRAME"):
            self._build(name)

    def _build(self, opcode: str) -> None:
        if opcode in ("TUPLE", "FROZENSET", "APPENDS", "SETITEMS", "ADDITEMS", "POP_MARK"):
            items, self._stack = self._stack, self._below.pop()
            if opcode in ("TUPLE", "FROZENSET"):
                self._stack.append((tuple if opcode == "TUPLE" else frozenset)(items))
            elif opcode != "POP_MARK":
                _fill(self._stack[-1], opcode, items)
            return
        stack = self._stack
        if opcode == "POP":
            stack.pop()
        elif opcode == "DUP":
            stack.append(stack[-1])
        elif opcode == "APPEND":
            _fill(stack[-2], "APPENDS", [stack.pop()])
        elif opcode == "SETITEM":
            value, key = stack.pop(), stack.pop()
            _fill(stack[-1], "SETITEMS", [key, value])
        elif opcode in ("STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD"):
            second, first = stack.pop(), stack.pop()
            stack.append(_OPERATIONS[opcode](first, second))
        else:
            raise NotAllowedError(f"pickle's opcode {opcode}")


def _fill(container: Any, opcode: str, items: list[Any]) -> None:
    kind = type(container)
    if opcode == "APPENDS" and kind in (list, deque):
        container.extend(items)
    elif opcode == "ADDITEMS" and kind is set:
        container.update(items)
    elif opcode == "SETITEMS" and kind in (dict, OrderedDict):
        container.update(zip(items[::2], items[1::2], strict=True))
    else:
        raise NotAllowedError(f"to fill a {kind.__name__}")


def named(module: Any, name: Any) -> Any:
    """
    :param module: name of a module
    :param name: of a class or function in it
    :return: the class, or what this module has in place of the function
    :raises NotAllowedError: if it is not on the list
    """
    if (module, name) in _MAKERS:
        return _MAKERS[module, name][0]
    for space in _SPACES:
        if (module, name) == (space.__module__, space.__name__):
            return space
    if name not in _CLASSES.get(module, "").split():
        raise NotAllowedError(f"{module}.{name}")
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise NotAllowedError(f"{module}.{name}, which is not installed ({error})") from None


def _reduce(function: Any, arguments: Any) -> Any:
    for known, make in _MAKERS.values():
        if known is function:
            return make(*_checked(arguments, tuple))
    raise NotAllowedError(f"to call {_name(function)}")


def _new_object(cls: Any, arguments: Any) -> Any:
    if arguments != () or not (any(cls is space for space in _SPACES) or _is_schedule(cls)):
        raise NotAllowedError(f"to make a {_name(cls)}")
    return object.__new__(cls)


def _set_state(instance: Any, state: Any) -> Any:
    kind = type(instance)
    if kind is np.ndarray:
        _fill_array(instance, *state)
    elif kind is np.dtype or isinstance(instance, np.dtype):
        _check_byte_order(*state)
    elif kind in _SPACES:
        # Versions of Gymnasium have various attributes. None may stand in for a method.
        others = {name for name in _checked(state, dict) if not callable(getattr(kind, str(name), None))}
        instance.__setstate__(_attributes(instance, state, others))
    elif kind is FloatSchedule:
        schedule = _attributes(instance, state, {"value_schedule"})["value_schedule"]
        if not _is_schedule(type(schedule)):
            raise NotAllowedError(f"a schedule of {_name(schedule)}")
        instance.value_schedule = schedule
    elif _is_schedule(kind):
        numbers = _attributes(instance, state, _SCHEDULE_ATTRIBUTES[kind.__name__])
        vars(instance).update({name: _checked(value, (int, float, np.number)) for name, value in numbers.items()})
    elif kind is np.random.Generator:
        instance.bit_generator.state = _generator_state(state)
    elif kind in _BIT_GENERATORS.values():
        _set_bit_generator(instance, state)
    elif kind is _SeedSequence:
        instance.state = _checked(state, tuple)
    else:
        raise NotAllowedError(f"to change a {_name(instance)}")
    return instance


_OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "STACK_GLOBAL": named,
    "REDUCE": _reduce,
    "NEWOBJ": _new_object,
    "BUILD": _set_state,
}


def _name(value: Any) -> str:
    cls = value if isinstance(value, type) else type(value)
    return f"{cls.__module__}.{cls.__qualname__}"


def _checked(value: Any, kinds: type | tuple[type, ...]) -> Any:
    if not isinstance(value, kinds):
        raise NotAllowedError(f"{_name(value)} where it cannot be")
    return value


def _attributes(instance: Any, state: Any, allowed: Any) -> Mapping[str, Any]:
    attributes: Mapping[str, Any] = _checked(state, dict)
    unknown = [name for name in attributes if name not in allowed]
    if unknown:
        raise NotAllowedError(f"an attribute {unknown[0]!r} of {_name(instance)}")
    return attributes


def _is_schedule(cls: Any) -> bool:
    zoo = sys.modules.get("rl_zoo3.utils")  # imported once a pickle has named it
    schedules = [ConstantSchedule, FloatSchedule, LinearSchedule, *([] if zoo is None else [zoo.SimpleLinearSchedule])]
    return any(cls is schedule for schedule in schedules)


# ---------------------------------------------------------------------- what is made, from checked arguments


def _make_deque(items: Any = (), maxlen: Any = None) -> deque[Any]:
    return deque(_checked(items, (list, tuple)), None if maxlen is None else _checked(maxlen, int))


def _make_path(*parts: Any) -> pathlib.Path:
    return pathlib.Path(*(_checked(part, str) for part in parts))


def _make_dtype(code: Any, *_: Any) -> np.dtype[Any]:
    if not _DTYPE.fullmatch(_checked(code, str)):
        raise NotAllowedError(f"numpy.dtype({code!r})")
    dtype: np.dtype[Any] = np.dtype(code)
    return dtype


def _check_byte_order(_: Any, order: Any, *__: Any) -> None:
    if order not in _NATIVE:
        raise NotAllowedError(f"numpy.dtype of byte order {order!r}")


def _numbers(data: Any, dtype: Any) -> np.ndarray:
    given = _checked(data, (bytes, bytearray))
    dtype = _checked(dtype, np.dtype)
    return np.frombuffer(given, dtype) if given else np.empty(0, dtype)


def _make_array(data: Any, dtype: Any, shape: Any, order: Any, axis_order: Any = None) -> np.ndarray:
    numbers = _numbers(data, dtype)
    if order == "K" and axis_order is not None:  # axes in another order, from NumPy 2.2 on
        return numbers.reshape(shape, order="C").transpose(axis_order).copy(order="K")
    return numbers.reshape(shape, order=order).copy(order="K")


def _make_empty_array(cls: Any, *_: Any) -> np.ndarray:
    if cls is not np.ndarray:
        raise NotAllowedError(f"an array of {_name(cls)}")
    return np.empty(0, np.int8)


def _fill_array(array: np.ndarray, _: Any, shape: Any, dtype: Any, is_fortran: Any, data: Any) -> None:
    shape = _numbers(data, dtype).reshape(shape).shape  # or the array would read beyond its data
    restore: Any = array.__setstate__
    restore((1, shape, dtype, bool(is_fortran), bytes(data)))


def _make_scalar(dtype: Any, data: Any) -> Any:
    (scalar,) = _numbers(data, dtype)
    return scalar


class _SeedSequence:
    """Stands for a seed sequence until its generator is made."""

    state: tuple[Any, ...] = ()

    def made(self) -> np.random.SeedSequence:
        entropy, n_spawned, pool, pool_size, spawn_key = self.state
        if pool_size != len(_checked(pool, np.ndarray)):
            raise ValueError("the pool of a seed sequence has another size")
        return np.random.SeedSequence(entropy, spawn_key=spawn_key, pool_size=pool_size, n_children_spawned=n_spawned)


def _make_seed_sequence(*_: Any) -> _SeedSequence:
    return _SeedSequence()


def _make_bit_generator(which: Any = "MT19937") -> np.random.BitGenerator:
    name = which.__name__ if isinstance(which, type) else which
    if name not in _BIT_GENERATORS:
        raise NotAllowedError(f"a generator {name!r}")
    return _BIT_GENERATORS[name](0)


def _set_bit_generator(generator: Any, state: Any) -> None:
    if isinstance(state, tuple):  # as NumPy writes them from version 2 on
        state, seed_sequence = state
        if hasattr(generator, "seed_seq") and isinstance(seed_sequence, _SeedSequence):
            generator.__setstate__((_generator_state(state), seed_sequence.made()))
            return
    generator.state = _generator_state(state)


def _generator_state(state: Any) -> dict[str, Any]:
    given: dict[str, Any] = _checked(state, dict)
    # NumPy does not look at positions, and would read beyond its arrays.
    for position, most in ((given.get("buffer_pos", 0), 4), (given["state"].get("pos", 0), 624)):
        if not 0 <= _checked(position, int) <= most:
            raise ValueError(f"a generator at position {position} of {most}")
    return given


def _make_generator(which: Any = "MT19937", *_: Any) -> np.random.Generator:
    is_made = isinstance(which, np.random.BitGenerator)
    return np.random.Generator(which if is_made else _make_bit_generator(which))


def _value(cls: type) -> tuple[type, Maker]:
    def refuse(*_: Any) -> Any:
        raise NotAllowedError(f"to call {_name(cls)}")

    return cls, refuse


# What a pickle may call by name: what stands for it on the machine's stack, and what is called in its place
_MAKERS: dict[tuple[Any, Any], tuple[Any, Maker]] = {
    ("collections", "deque"): (deque, _make_deque),
    ("collections", "OrderedDict"): (OrderedDict, lambda: OrderedDict()),
    ("pathlib", "PosixPath"): (_make_path, _make_path),
    ("pathlib._local", "PosixPath"): (_make_path, _make_path),
    ("numpy", "dtype"): (_make_dtype, _make_dtype),
    **{
        (f"numpy.{core}.{module}", name): (make, make)
        for core in ("core", "_core")
        for module, name, make in (
            ("numeric", "_frombuffer", _make_array),
            ("multiarray", "_reconstruct", _make_empty_array),
            ("multiarray", "scalar", _make_scalar),
        )
    },
    ("numpy.random._pickle", "__generator_ctor"): (_make_generator, _make_generator),
    ("numpy.random._pickle", "__bit_generator_ctor"): (_make_bit_generator, _make_bit_generator),
    ("numpy.random.bit_generator", "__pyx_unpickle_SeedSequence"): (_make_seed_sequence, _make_seed_sequence),
    **{(cls.__module__, cls.__name__): _value(cls) for cls in (ConstantSchedule, FloatSchedule, LinearSchedule)},
}
