"""Refuse text, true and false as values of parameters that do not take them, by the parameters' annotations."""

import collections.abc
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import load_env_creator

# Types of which a value is only an object of exactly this type, among text, true and false
_CLOSED = (
    bool,
    int,
    float,
    complex,
    str,
    list,
    tuple,
    dict,
    set,
    type,
    types.NoneType,
    np.ndarray,
    collections.abc.Callable,
)
_IN_WORDS = {bool: "True or False", int: "an integer", float: "a number", str: "text", types.NoneType: "None"}


class Parameter(NamedTuple):
    """
    Parameter of a function.

    :param annotation: its annotation, ``inspect.Parameter.empty`` if it has none
    :param default: its default, ``inspect.Parameter.empty`` if it has none
    """

    annotation: Any
    default: Any


def parameters_of(function: Callable[..., Any]) -> dict[str, Parameter]:
    """
    :param function: a function or a class
    :return: its parameters by name. For a class whose ``__init__`` passes ``**kwargs`` on, with those of the next class
    """
    found: dict[str, Parameter] = {}
    constructors = [vars(cls)["__init__"] for cls in getattr(function, "__mro__", ()) if "__init__" in vars(cls)]
    has_signature = hasattr(function, "__signature__")  # our algorithms, whose parameters are merged
    for each in [function] if has_signature or not constructors else constructors:
        try:
            parameters = inspect.signature(each).parameters.values()
        except (TypeError, ValueError):  # of a built-in
            break
        try:
            hints = {} if inspect.isclass(each) else typing.get_type_hints(each)
        except Exception:  # a name that only type checkers import
            hints = {}
        for parameter in parameters:
            found.setdefault(
                parameter.name, Parameter(hints.get(parameter.name, parameter.annotation), parameter.default)
            )
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return found


def check_value(name: str, value: Any, parameter: Parameter) -> None:
    """
    :param name: name of the parameter
    :param value: its value; only text, ``True`` and ``False`` are checked
    :param parameter: the parameter
    :raises ValueError: if the parameter is known not to take the value
    """
    if not isinstance(value, str | bool):
        return
    annotation, default = parameter
    if annotation is inspect.Parameter.empty:
        if isinstance(value, bool) or not isinstance(default, bool):
            return
        annotation = bool
    if not _takes(annotation, value):
        raise ValueError(f"{name} must be {_in_words(annotation)}, got {value!r}")


def check_env_kwargs(env_id: str, env_kwargs: Mapping[str, Any]) -> None:
    """
    :param env_id: name of an environment in Gymnasium
    :param env_kwargs: arguments of its constructor
    :raises ValueError: if a value is text, ``True`` or ``False`` and the parameter is known not to take it
    """
    entry_point = gym.spec(env_id).entry_point
    try:
        creator = load_env_creator(entry_point) if isinstance(entry_point, str) else entry_point
    except Exception:  # a missing package: making the environment names it
        return
    parameters = parameters_of(creator) if creator is not None else {}
    for name, value in env_kwargs.items():
        if name in parameters:
            check_value(f"env_kwargs of {env_id}: {name}", value, parameters[name])


def _takes(annotation: Any, value: Any) -> bool:
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(_takes(each, value) for each in typing.get_args(annotation))
    if origin is typing.Annotated:
        return _takes(typing.get_args(annotation)[0], value)
    if origin is Literal:
        return any(type(choice) is type(value) and choice == value for choice in typing.get_args(annotation))
    plain = types.NoneType if annotation is None else origin or annotation
    return plain not in _CLOSED or type(value) is plain


def _in_words(annotation: Any) -> str:
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_in_words(each) for each in typing.get_args(annotation)))
    if origin is Literal:
        return " or ".join(map(repr, typing.get_args(annotation)))
    plain = types.NoneType if annotation is None else origin or annotation
    if plain is collections.abc.Callable:
        return "a function"
    return _IN_WORDS.get(plain) or inspect.formatannotation(annotation)
