"""
A misspelled ``callback``, ``env_wrapper``, ``vec_env_wrapper`` or ``policy`` ends in a traceback, or is blamed on
something else.

Seen in rl_zoo3 2.9.2. ``get_class_by_name`` and ``get_wrapper_class`` import what the text names without a check: a
name without a module is an "Empty module name", a missing class an ``AttributeError``, a wrong argument a ``TypeError``
of the class. Source: https://github.com/DLR-RM/rl-baselines3-zoo/blob/master/rl_zoo3/utils.py.
"""

import difflib
import importlib
import inspect
from collections.abc import Iterator
from typing import Any

import rl_zoo3.utils
from rl_zoo3 import exp_manager
from rl_zoo3.exp_manager import ExperimentManager
from stable_baselines3.common.callbacks import BaseCallback

from sb3_ppo_ewma.zoo.patches._replace import AnyFunction, replace_function


def is_needed() -> bool:
    """:return: whether a name without a module is not named"""
    try:
        rl_zoo3.utils.get_class_by_name("sb3_ppo_ewma_no_such_class")
    except ValueError as error:
        return "sb3_ppo_ewma_no_such_class" not in str(error)
    return False


def apply() -> None:
    """Raise a ``ValueError`` that names the hyper-parameter and its mistake. Take classes as well as names."""
    replace_function(ExperimentManager, "_preprocess_hyperparams", _preprocess_hyperparams)
    for module in (rl_zoo3.utils, exp_manager):
        replace_function(module, "get_class_by_name", _get_class_by_name)
        replace_function(module, "get_wrapper_class", _get_wrapper_class)


def _preprocess_hyperparams(upstream: AnyFunction, manager: Any, hyperparams: dict[str, Any]) -> Any:
    policy = hyperparams.get("policy", "")
    if not isinstance(policy, (str, type)):
        raise ValueError(f"policy must be a name or a class, got {policy!r}")
    if isinstance(policy, type):  # upstream looks for a dot in it
        hyperparams["policy"] = f"{policy.__module__}.{policy.__qualname__}"
    elif "." in policy:
        _class_of(policy, "policy")
    for callback, arguments in _entries(hyperparams.get("callback"), "callback"):
        if isinstance(callback, BaseCallback):
            continue
        found = _class_of(callback, "callback")
        if not (isinstance(found, type) and issubclass(found, BaseCallback)):
            raise ValueError(f"callback must name subclasses of BaseCallback, got {callback!r}")
        _check_arguments(found, arguments, callback, "callback")
    return upstream(manager, hyperparams)


def _get_wrapper_class(upstream: AnyFunction, hyperparams: dict[str, Any], key: str = "env_wrapper") -> Any:
    for wrapper, arguments in _entries(hyperparams.get(key), key):
        found = _class_of(wrapper, key)
        if not callable(found):
            raise ValueError(f"{key} must name wrappers, got {wrapper!r}")
        _check_arguments(found, arguments, wrapper, key, "env")
    return upstream(hyperparams, key)


def _get_class_by_name(upstream: AnyFunction, name: Any) -> Any:
    return _class_of(name, "a class")


def _entries(given: Any, key: str) -> Iterator[tuple[Any, Any]]:
    """
    :param given: value of a hyper-parameter that names classes: one or a list of names, or of dictionaries of a name
        and its arguments
    :param key: name of the hyper-parameter
    :return: names and arguments
    """
    for each in given if isinstance(given, list) else [] if given is None else [given]:
        if not isinstance(each, dict):
            yield each, {}
        elif len(each) == 1:
            yield next(iter(each.items()))
        else:
            raise ValueError(f"{key} must be a name, or a name with its arguments indented below it, got {each!r}")


def _class_of(name: Any, key: str) -> Any:
    """
    :param name: full name of a class, or the class
    :param key: name of the hyper-parameter
    :return: the class
    :raises ValueError: if there is none
    """
    if not isinstance(name, str):
        return name
    module_name, _, class_name = name.rpartition(".")
    if not module_name:
        raise ValueError(f"{key} must be named with its module, as in my_module.{name}, got {name!r}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # something that the module needs
        raise ValueError(f"{key} names {name!r}, but there is no module {error.name}") from error
    if not hasattr(module, class_name):
        near = difflib.get_close_matches(class_name, vars(module), n=1)
        raise ValueError(f"{key}: {module_name} has no {class_name!r}{f'. Did you mean {near[0]!r}?' if near else ''}")
    return getattr(module, class_name)


def _check_arguments(called: Any, arguments: Any, name: Any, key: str, *given: str) -> None:
    if not isinstance(arguments, dict):
        raise ValueError(f"{key}: the arguments of {name} must be names with values, got {arguments!r}")
    signature = inspect.signature(called)
    try:
        signature.bind(*given, **arguments)
    except TypeError as error:
        known = ", ".join(parameter for parameter in signature.parameters if parameter not in given)
        raise ValueError(
            f"{key} {name}: {error}. {getattr(called, '__name__', name)} has {known or 'no arguments'}"
        ) from None
