"""
``enjoy`` cannot load agents whose hyper-parameters contain a ``lambda``, or a class or function that no module has.

Seen in rl_zoo3 2.9.2. ``_save_config`` writes objects into ``config.yml`` by the name of their module, which is read
again only after training. Source:
https://github.com/DLR-RM/rl-baselines3-zoo/blob/master/rl_zoo3/exp_manager.py.
"""

import sys
from collections.abc import Iterator
from types import FunctionType
from typing import Any

from rl_zoo3.exp_manager import ExperimentManager

from sb3_ppo_ewma.zoo.patches._replace import AnyFunction, replace_function, upstream_source


def is_needed() -> bool:
    """:return: whether upstream writes what is in the hyper-parameters without a check"""
    return "yaml.dump(saved_hyperparams, f)" in upstream_source(ExperimentManager._save_config)


def apply() -> None:
    """Raise a ``ValueError`` before training."""
    replace_function(ExperimentManager, "read_hyperparameters", _read_hyperparameters)


def _read_hyperparameters(upstream: AnyFunction, manager: Any) -> Any:
    hyperparams, saved = upstream(manager)
    for name, value in saved.items():
        for found in _without_module(value):
            raise ValueError(
                f"{name}: {found} cannot be saved for enjoy: define it by name in a module that can be imported, such "
                "as one in the current folder"
            )
    return hyperparams, saved


def _without_module(value: Any) -> Iterator[str]:
    """
    :param value: value of a hyper-parameter
    :return: names of the classes and functions in it that their module does not have
    """
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for each in value:
            yield from _without_module(each)
        return
    if isinstance(value, (type, FunctionType)):
        found: Any = sys.modules.get(value.__module__)
        for part in value.__qualname__.split("."):
            found = getattr(found, part, None)
        if found is not value:
            yield value.__qualname__
