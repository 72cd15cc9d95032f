"""
Constructor arguments: classes pass SB3's on without repeating them, ``help`` still shows them. Checks of numbers,
schedules and choices, from which ``_rules`` has one for each argument.
"""

import difflib
import functools
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, Literal, ParamSpec, cast

import numpy as np
import torch as th
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule

Arguments = ParamSpec("Arguments")
# clip_range=None as a number, which SB3 can make a schedule of and YAML files of the zoo can hold.
CLIP_OFF = -1.0
KlEstimator = Literal["sample", "analytic"]
StalenessMode = Literal["decoupled", "behavior", "proximal"]
LagMode = Literal["fixed", "newest"]
EngineChoice = Literal["auto", "reference"]
CompileMode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]

_LOGGING_DEFAULTS = {"log_interval": 1, "tb_log_name": None}
PACKAGES = ("sb3_ppo_ewma", "stable_baselines3", "sb3_contrib")
# SB3, NumPy and torch count in 64 bits
LARGEST_INTEGER = 2**63 - 1
# Learning rates and ranges above it overflow in single precision.
_LARGEST_SETTING = 1e30
# Integers up to this one are floats, too
_LARGEST_EXACT = 2**53
_LONGEST_VALUE = 200


class SB3ArgumentError(ValueError, AssertionError):
    """A ``ValueError`` that is also an ``AssertionError``, which SB3 raises for some values and callers may catch."""


def merged_signature(cls: type) -> inspect.Signature:
    """
    Merge the signatures of a class whose ``__init__`` passes ``*args, **kwargs`` on to the next class in the MRO: the
    next class's parameters in their order, then the keyword-only ones of the classes before it. Defaults of the classes
    before it and of ``_sb3_defaults`` override its own. If an ``__init__`` names positional parameters, those of the
    classes after it become keyword-only and optional, since the ``__init__`` may supply them.

    :param cls: the class
    :return: its signature, without ``self``
    """
    own: dict[str, inspect.Parameter] = {}
    positional: list[inspect.Parameter] = []
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        passes_on = any(p.kind is p.VAR_KEYWORD for p in parameters)
        named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        ends_positional = bool(positional)
        for parameter in named:
            if ends_positional and parameter.default is parameter.empty:
                parameter = parameter.replace(default=None)
            if parameter.kind is parameter.KEYWORD_ONLY or ends_positional:
                own.setdefault(parameter.name, parameter.replace(kind=parameter.KEYWORD_ONLY))
            else:
                default = own[parameter.name].default if parameter.name in own else parameter.default
                positional.append(parameter.replace(default=default))
        if not passes_on:
            break
    changed: Mapping[str, Any] = getattr(cls, "_sb3_defaults", {})
    positional = [p.replace(default=changed[p.name]) if p.name in changed else p for p in positional]
    names = {parameter.name for parameter in positional}
    return inspect.Signature([*positional, *(p for name, p in own.items() if name not in names)])


def bind_arguments(
    cls: type, base: type, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    Bind positional and keyword arguments to the parameters of a base class's constructor.

    :param cls: class under construction, for the error message
    :param base: class whose ``__init__`` will be called
    :param args: positional arguments
    :param kwargs: keyword arguments
    :return: the given arguments by name; all arguments by name, with defaults
    :raises TypeError: if the arguments do not fit the parameters; suggests the nearest name for a misspelled one
    """
    signature = merged_signature(base)
    check_names(cls.__name__, [*kwargs], [*signature.parameters], [*merged_signature(cls).parameters])
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{cls.__name__}() {error}") from None
    given = dict(bound.arguments)
    bound.apply_defaults()
    return given, dict(bound.arguments)


def check_names(called: str, given: Sequence[str], known: Sequence[str], suggested: Sequence[str] = ()) -> None:
    """
    :param called: name of what is called, for the error message
    :param given: names of the keyword arguments
    :param known: names that they may have
    :param suggested: names to suggest instead of a misspelled one; empty: the known ones
    :raises TypeError: for a name that is not known; suggests the nearest one
    """
    for name in given:
        if name not in known:
            hint = did_you_mean(name, (each for each in suggested or known if each != name))
            raise TypeError(f"{called}() got an unexpected keyword argument {name!r}{hint}")


def naming_misspelled(init: Callable[Arguments, None]) -> Callable[Arguments, None]:
    """
    :param init: an ``__init__`` without ``**kwargs``
    :return: the same, whose error for a misspelled keyword argument suggests the nearest one
    """

    @functools.wraps(init)
    def checked(*args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        check_names(type(args[0]).__name__, list(kwargs), [*inspect.signature(init).parameters][1:])
        init(*args, **kwargs)

    return checked


def is_clip_off(clip_range: Any) -> bool:
    """
    :param clip_range: a schedule
    :return: whether the schedule is a negative constant, which switches the clip off
    """
    schedule = clip_range.value_schedule if isinstance(clip_range, FloatSchedule) else clip_range
    return isinstance(schedule, ConstantSchedule) and schedule.val < 0


def logging_arguments(
    model: Any, learn: Any, log_interval: int | None, tb_log_name: str | None
) -> dict[str, int | str | None]:
    """
    :param model: an algorithm
    :param learn: method of the algorithm that it extends, which may have defaults of its own
    :param log_interval: iterations between logs, ``None``: no logs
    :param tb_log_name: name of the run for tensorboard, ``None``: none is given
    :return: arguments of that method
    """
    given: dict[str, int | str | None] = {"log_interval": log_interval, "tb_log_name": tb_log_name}
    if learn.__module__.partition(".")[0] in PACKAGES:
        return {**given, "tb_log_name": type(model).__name__ if tb_log_name is None else tb_log_name}
    return {name: value for name, value in given.items() if value != _LOGGING_DEFAULTS[name]}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """
    :param name: a name that is not known
    :param known: those that are
    :return: end of an error message: the nearest one, or nothing
    """
    close = difflib.get_close_matches(name, list(known), n=1)
    return f". Did you mean {close[0]!r}?" if close else ""


def shown(value: Any) -> str:
    """
    :param value: any value
    :return: how error messages show it, in one line
    """
    try:
        text = " ".join(repr(value).split())
    except Exception:  # integers with very many digits, and objects that are broken
        text = f"a {type(value).__name__}"
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…"


def plain(value: Any) -> Any:
    """
    :param value: any value
    :return: Python's number for one of NumPy or torch, or an array or tensor of shape (); all else as it is
    """
    if isinstance(value, np.generic | np.ndarray | th.Tensor) and value.ndim == 0:
        return value.item()
    return value


def checked_clip_range(name: str, value: Any) -> float | Schedule:
    """
    :param name: ``"clip_range"``
    :param value: the user's argument
    :return: the clip range in a form that SB3 accepts
    :raises TypeError: if it is not a number, a schedule or ``None``
    :raises ValueError: if it is 1 or above, or a schedule that starts below 0
    """
    if value is None:
        return CLIP_OFF
    start = schedule_start(name, value, "a number below 1, a schedule or None")
    if start < 0 and callable(value) and not is_clip_off(value):
        raise ValueError(f"{name} must start at 0 or above, got a schedule that starts at {start}; None: no clip")
    if not -math.inf < start < 1:
        raise ValueError(
            f"{name} must be below 1 (the ratio is clipped to [1 - clip_range, 1 + clip_range]), got {start}; "
            "None or a negative number: no clip"
        )
    return cast(Schedule, value) if callable(value) else start


def checked_clip_range_vf(name: str, value: Any) -> float | Schedule | None:
    """
    :param name: ``"clip_range_vf"``
    :param value: the user's argument
    :return: the range in a form that SB3 accepts
    :raises TypeError: if it is not a number, a schedule or ``None``
    :raises ValueError: if it is not positive, a schedule that does not start above 0, or too large for single precision
    """
    if value is None:
        return None
    start = schedule_start(name, value, "a positive number, a schedule or None")
    if not 0 < start <= _LARGEST_SETTING:
        kind = "a schedule that starts at " if callable(value) else ""
        raise SB3ArgumentError(
            f"{name} must be positive and at most {_LARGEST_SETTING}, or None for no clipping, got {kind}{start}"
        )
    return cast(Schedule, value) if callable(value) else start


def schedule_start(name: str, value: Any, allowed: str) -> float:
    """
    :param name: name of the parameter, for the error message
    :param value: number or schedule
    :param allowed: what it may be, for the error message
    :return: the number, or what the schedule starts with
    :raises TypeError: if it is neither a number nor a function of the remaining progress that returns one
    """
    if callable(value) and not isinstance(value, type):
        return schedule_value(name, value, 1.0)
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, Real):
        raise TypeError(f"{name} must be {allowed}, got {shown(value)}")
    return as_float(number)


def schedule_value(name: str, schedule: Schedule, progress: float) -> float:
    """
    :param name: name of the parameter, for the error message
    :param schedule: its schedule
    :param progress: remaining progress
    :return: its value
    :raises TypeError: if it is not a number
    :raises ValueError: if the schedule raises one
    """
    try:
        value = plain(schedule(progress))
    except (TypeError, ValueError) as error:
        raise (TypeError if isinstance(error, TypeError) else ValueError)(
            f"{name} must be a number or a function of the remaining progress that returns one, "
            f"{shown(schedule)} fails: {error}"
        ) from error
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"the schedule of {name} must give a number, got {shown(value)} at progress {progress:.3f}")
    return as_float(value)


def as_float(number: Real) -> float:
    """
    :param number: a real number
    :return: the same as a float, infinite where it is too large for one
    """
    try:
        return float(number)
    except OverflowError:
        return math.copysign(math.inf, number)


def check_number(name: str, value: Any, low: float, high: float = math.inf, *, closed: bool = False) -> float:
    """
    :param name: name of the parameter, for the error message
    :param value: value of the parameter
    :param low: smallest allowed value
    :param high: upper bound of the allowed values
    :param closed: whether ``high`` itself is allowed
    :return: the value as a number of Python
    :raises TypeError: if the value is not a real number
    :raises ValueError: if the value is out of range or NaN
    """
    if high < math.inf:
        allowed = f"in [{low}, {high}{']' if closed else ')'}"
    else:
        allowed = f">= {low}" if low > -math.inf else "finite"
    plain_value = plain(value)
    is_integer = isinstance(plain_value, int)
    if isinstance(plain_value, bool) or not isinstance(plain_value, Real):
        raise TypeError(f"{name} must be a number ({allowed}), got {shown(value)}")
    number = as_float(plain_value)
    if not (low <= number < high or (closed and number == high)) or number == -math.inf:
        raise ValueError(f"{name} must be {allowed}, got {shown(plain_value)}")
    return int(number) if is_integer and abs(number) <= _LARGEST_EXACT else number


def check_schedule(name: str, value: Any) -> float | Schedule:
    """
    :param name: name of a learning rate, for the error message
    :param value: number or schedule
    :return: the number as one of Python, or the schedule
    :raises TypeError: if the value is neither
    :raises ValueError: if the number, or the start of the schedule, is below 0 or so large that steps overflow
    """
    checked = check_learning_rate(name, value)
    if callable(checked):
        check_learning_rate(f"{name} at the start", schedule_value(name, checked, 1.0))
    return checked


def scheduled(model: Any, name: str, schedule: Schedule) -> float:
    """
    :param model: an algorithm
    :param name: name of the parameter, for the error message
    :param schedule: its schedule
    :return: its value now, at least 0
    :raises TypeError: if it is not a number
    :raises ValueError: if it is NaN or Inf
    """
    progress = model._current_progress_remaining
    value = schedule_value(name, schedule, progress)
    if not math.isfinite(value):
        raise ValueError(f"the schedule of {name} gives {value} at progress {progress:.3f}, which must be finite")
    return max(value, 0.0)


def scheduled_learning_rate(model: Any, name: str, schedule: Schedule) -> float:
    """
    :param model: an algorithm
    :param name: name of the parameter, for the error message
    :param schedule: its schedule
    :return: its value now, at least 0
    :raises TypeError: if it is not a number
    :raises ValueError: if it is NaN, or so large that steps overflow
    """
    value = scheduled(model, name, schedule)
    if value > _LARGEST_SETTING:
        raise ValueError(f"the schedule of {name} gives {value}, which must be at most {_LARGEST_SETTING}")
    return value


def check_learning_rate(name: str, value: Any) -> float | Schedule:
    """
    :param name: name of the parameter, for the error message
    :param value: number or schedule, which is not asked: one that counts would change
    :return: the number as one of Python, or the schedule
    :raises TypeError: if the value is neither
    :raises ValueError: if the number is below 0, or so large that steps overflow
    """
    if callable(value) and not isinstance(value, type):
        return cast(Schedule, value)
    number = check_number(name, value, 0)
    if number > _LARGEST_SETTING:
        raise ValueError(f"{name} must be at most {_LARGEST_SETTING}, got {number}")
    return number


def warn_caller(message: str) -> None:
    """
    Issue a warning that points at the caller's code, outside this package and SB3.

    :param message: text of the warning
    """
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in PACKAGES:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def check_integer(name: str, value: Any, minimum: int, maximum: int = LARGEST_INTEGER) -> int:
    """
    :param name: name of the parameter, for the error message
    :param value: value of the parameter
    :param minimum: smallest allowed value
    :param maximum: largest allowed value
    :return: the value as an integer of Python
    :raises TypeError: if the value is not an integer
    :raises ValueError: if the value is out of range
    """
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"{name} must be an integer >= {minimum}, got {shown(value)}")
    if number < minimum:
        raise SB3ArgumentError(f"{name} must be >= {minimum}, got {number}")
    if number > maximum:
        raise ValueError(f"{name} must be in [{minimum}, {maximum}], got {shown(number)}")
    return number


def check_flag(name: str, value: Any) -> bool:
    """
    :param name: name of the parameter, for the error message
    :param value: value of the parameter
    :return: the value as a bool of Python
    :raises TypeError: if the value is neither true nor false
    """
    flag = plain(value)
    if not isinstance(flag, bool):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")
    return flag


def check_choice(name: str, value: Any, choices: tuple[str, ...], others: str = "") -> str:
    """
    :param name: name of the parameter, for the error message
    :param value: value of the parameter
    :param choices: allowed values
    :param others: other allowed values in words, for the error message
    :return: the value as a string of Python
    :raises ValueError: if the value is not one of ``choices``
    """
    if not isinstance(value, str) or value not in choices:
        allowed = ", ".join([*map(repr, choices), *([others] if others else [])])
        raise ValueError(f"{name} must be one of {allowed}, got {shown(value)}")
    return str(value)
