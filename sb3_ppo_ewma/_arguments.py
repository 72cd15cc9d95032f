"""
Constructor arguments: classes pass SB3's on without repeating them, ``help`` still shows them, and all are checked
before anything is built.
"""

import difflib
import functools
import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, Literal, ParamSpec, cast, get_args

import numpy as np
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule

from sb3_ppo_ewma._parallel.process_group import check_data_parallel

Arguments = ParamSpec("Arguments")
# clip_range=None as a number, which SB3 can make a schedule of and YAML files of the zoo can hold.
CLIP_OFF = -1.0
KlEstimator = Literal["sample", "analytic"]
StalenessMode = Literal["decoupled", "behavior", "proximal"]
LagMode = Literal["fixed", "newest"]
EngineChoice = Literal["auto", "reference"]
CompileMode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]

_LOGGING_DEFAULTS = {"log_interval": 1, "tb_log_name": None}
_PACKAGES = ("sb3_ppo_ewma", "stable_baselines3", "sb3_contrib")


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
            close = difflib.get_close_matches(name, [each for each in suggested or known if each != name], n=1)
            hint = f". Did you mean {close[0]!r}?" if close else ""
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


def check_sb3_arguments(arguments: dict[str, Any], advantage_decay: float | None) -> None:
    """
    :param arguments: SB3's constructor arguments by name, with defaults
    :param advantage_decay: decay of the advantages' moments, or ``None``
    :raises TypeError: if an argument has the wrong type
    :raises ValueError: if an argument is out of range
    """
    if advantage_decay is not None:
        check_normalization(advantage_decay, arguments["normalize_advantage"])
    batch_size = arguments["batch_size"]
    if batch_size is not None:
        check_integer("batch_size", batch_size, minimum=1)
        if batch_size == 1 and arguments["normalize_advantage"] and advantage_decay is None:
            raise SB3ArgumentError(
                "batch_size must be greater than 1 to normalise advantages per minibatch, got 1; "
                "advantage_decay=0.0 normalises over the rollout and allows 1"
            )
    check_integer("n_steps", arguments["n_steps"], minimum=1)
    check_update_limits(arguments["n_epochs"], arguments["max_grad_norm"], arguments["target_kl"])
    for name in ("gamma", "gae_lambda"):
        check_number(name, arguments[name], 0, 1, closed=True)
    check_number("ent_coef", arguments["ent_coef"], -math.inf)
    check_number("vf_coef", arguments["vf_coef"], 0)
    checked_clip_range(arguments["clip_range"])
    clip_range_vf = arguments["clip_range_vf"]
    if isinstance(clip_range_vf, Real) and not float(clip_range_vf) > 0:
        raise SB3ArgumentError(f"clip_range_vf must be positive, or None for no clipping, got {clip_range_vf}")


def check_policy_class(model: Any, needed: type, reason: str) -> None:
    """
    :param model: an algorithm that is about to build its policy
    :param needed: class that the policy must be derived from
    :param reason: what that class has
    :raises ValueError: if the policy is not derived from it
    """
    if not (isinstance(model.policy_class, type) and issubclass(model.policy_class, needed)):
        base = next(iter(model.policy_aliases.values())).__name__
        raise ValueError(
            f"policy must be one of {', '.join(map(repr, model.policy_aliases))} or a class derived from {base}, "
            f"{reason}, got {model.policy_class}"
        )


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
    if learn.__module__.partition(".")[0] in _PACKAGES:
        return {**given, "tb_log_name": type(model).__name__ if tb_log_name is None else tb_log_name}
    return {name: value for name, value in given.items() if value != _LOGGING_DEFAULTS[name]}


def check_update_limits(n_epochs: Any, max_grad_norm: Any, target_kl: Any) -> None:
    """
    :param n_epochs: number of epochs
    :param max_grad_norm: norm that gradients are clipped to, ``float("inf")``: no clipping
    :param target_kl: divergence that ends an iteration, or ``None``
    :raises TypeError: if one has the wrong type
    :raises ValueError: if one is out of range
    """
    check_integer("n_epochs", n_epochs, minimum=1)
    check_number("max_grad_norm", max_grad_norm, 0, closed=True)
    if target_kl is not None:
        check_number("target_kl", target_kl, 0)


def check_normalization(advantage_decay: float, normalize_advantage: bool) -> None:
    """
    :param advantage_decay: decay of the advantages' moments
    :param normalize_advantage: SB3's parameter
    :raises ValueError: if the two contradict each other
    """
    if not normalize_advantage:
        raise ValueError(
            f"advantage_decay={advantage_decay} normalises advantages and contradicts normalize_advantage=False: "
            "use advantage_decay=None"
        )


def checked_clip_range(clip_range: Any) -> float | Schedule:
    """
    :param clip_range: the user's argument
    :return: the clip range in a form that SB3 accepts
    :raises TypeError: if ``clip_range`` is not a number, a schedule or ``None``
    :raises ValueError: if it is 1 or above, or a schedule that starts below 0
    """
    if clip_range is None:
        return CLIP_OFF
    if isinstance(clip_range, str) or not (callable(clip_range) or isinstance(clip_range, Real)):
        raise TypeError(f"clip_range must be a number below 1, a schedule or None, got {clip_range!r}")
    value = float(clip_range(1.0) if callable(clip_range) else clip_range)
    if value < 0 and callable(clip_range) and not is_clip_off(clip_range):
        raise ValueError(f"clip_range must start at 0 or above, got a schedule that starts at {value}; None: no clip")
    if not value < 1:
        raise ValueError(
            f"clip_range must be below 1 (the ratio is clipped to [1 - clip_range, 1 + clip_range]), got {value}"
        )
    return cast(Schedule, clip_range) if callable(clip_range) else value


def check_number(name: str, value: Any, low: float, high: float = math.inf, *, closed: bool = False) -> None:
    """
    :param name: name of the parameter, for the error message
    :param value: value of the parameter
    :param low: smallest allowed value
    :param high: upper bound of the allowed values
    :param closed: whether ``high`` itself is allowed
    :raises TypeError: if the value is not a real number
    :raises ValueError: if the value is out of range or NaN
    """
    if high < math.inf:
        allowed = f"in [{low}, {high}{']' if closed else ')'}"
    else:
        allowed = f">= {low}" if low > -math.inf else "finite"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number ({allowed}), got {value!r}")
    number = float(value)
    if not (low <= number < high or (closed and number == high)):
        raise ValueError(f"{name} must be {allowed}, got {value}")


def check_schedule(name: str, value: Any) -> None:
    """
    :param name: name of the parameter, for the error message
    :param value: number or schedule
    :raises TypeError: if the value is neither
    :raises ValueError: if the number, or the start of the schedule, is below 0
    """
    if callable(value):
        check_number(f"{name} at the start", value(1.0), 0)
    else:
        check_number(name, value, 0)


def scheduled(model: Any, name: str, schedule: Schedule) -> float:
    """
    :param model: an algorithm
    :param name: name of the parameter, for the error message
    :param schedule: its schedule
    :return: its value now, at least 0
    :raises ValueError: if it is NaN or Inf
    """
    progress = model._current_progress_remaining
    value = schedule(progress)
    if not math.isfinite(value):
        raise ValueError(f"the schedule of {name} gives {value} at progress {progress:.3f}")
    return max(value, 0.0)


def warn_caller(message: str) -> None:
    """
    Issue a warning that points at the caller's code, outside this package and SB3.

    :param message: text of the warning
    """
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _PACKAGES:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def check_integer(name: str, value: Any, minimum: int) -> None:
    """
    :param name: name of the parameter, for the error message
    :param value: value of the parameter
    :param minimum: smallest allowed value
    :raises TypeError: if the value is not an integer
    :raises ValueError: if the value is below the minimum
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer >= {minimum}, got {value!r}")
    if value < minimum:
        raise SB3ArgumentError(f"{name} must be >= {minimum}, got {value}")


def check_choice(name: str, value: Any, choices: tuple[str, ...], others: str = "") -> None:
    """
    :param name: name of the parameter, for the error message
    :param value: value of the parameter
    :param choices: allowed values
    :param others: other allowed values in words, for the error message
    :raises ValueError: if the value is not one of ``choices``
    """
    if value not in choices:
        allowed = ", ".join([*map(repr, choices), *([others] if others else [])])
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")


def check_ewma_parameters(model: Any) -> None:
    """
    :param model: an algorithm with the parameters of ``EwmaMixin``
    :raises TypeError: if one has the wrong type
    :raises ValueError: if one is out of its range
    """
    if isinstance(model.prox_decay, str):
        check_choice("prox_decay", model.prox_decay, ("auto",), "a number in [0, 1) or None")
    elif model.prox_decay is not None:
        check_number("prox_decay", model.prox_decay, 0, 1)
    check_number("kl_coef", model.kl_coef, 0)
    check_choice("kl_estimator", model.kl_estimator, get_args(KlEstimator))
    check_choice("staleness_mode", model.staleness_mode, get_args(StalenessMode))
    if model.max_importance_ratio is not None:
        check_number("max_importance_ratio", model.max_importance_ratio, 1)
    if model.advantage_decay is not None:
        check_number("advantage_decay", model.advantage_decay, 0, 1)
    if model.n_epochs_value is not None:
        check_integer("n_epochs_value", model.n_epochs_value, minimum=1)
    check_integer("staleness", model.staleness, minimum=0)
    check_data_parallel(model.data_parallel)
    if model.max_policy_lag is not None:
        check_integer("max_policy_lag", model.max_policy_lag, minimum=0)
    check_choice("lag_mode", model.lag_mode, get_args(LagMode))
    check_number("collector_timeout", model.collector_timeout, 0)
    if model.collector_timeout == 0:
        raise ValueError("collector_timeout must be > 0, got 0")
    check_choice("collect", model.collect, ("together", "as_ready"))
    check_choice("engine", model.engine, get_args(EngineChoice))
    if not isinstance(model.torch_compile, bool):
        check_choice("torch_compile", model.torch_compile, get_args(CompileMode), "True or False")
    if not isinstance(model.recompute_advantages, bool):
        raise TypeError(f"recompute_advantages must be True or False, got {model.recompute_advantages!r}")
    unavailable = model._is_stale and model.staleness_mode == "behavior" and model.prox_decay is None
    if model.kl_coef > 0 and model.kl_estimator == "analytic" and unavailable:
        raise ValueError(
            "kl_estimator='analytic' needs the distributions of the proximal policy, but with prox_decay=None and "
            "staleness_mode='behavior' that is a past policy of which only log-probabilities are kept: "
            "use kl_estimator='sample'"
        )


def check_built_parameters(model: Any) -> None:
    """
    Refuse parameters that were set by hand to impossible values, or to values that the model was not built for.

    :param model: an algorithm with the parameters of ``EwmaMixin``
    :raises TypeError: if one has the wrong type
    :raises ValueError: if one is out of range, or the model was built for another value
    """
    model._check_own_parameters()
    check_update_limits(model.n_epochs, model.max_grad_norm, model.target_kl)
    for name, fits in model._fits_built_model().items():
        if not fits:
            raise ValueError(
                f"{name} was set to {getattr(model, name)!r} by hand, but the model was built for another value: "
                f"save it and give {name} to load()"
            )
    if model.advantage_moments is not None:
        check_normalization(cast(float, model.advantage_decay), model.normalize_advantage)
        model.advantage_moments.decay = cast(float, model.advantage_decay)
