"""
``enjoy`` cannot load agents whose ``-conf FILE.py`` defines a class or a function. A configuration in Python without
``hyperparams``, or one that is neither a file nor a module, is a traceback.

Seen in rl_zoo3 2.9.2. ``read_hyperparameters`` executes the file without a name, so that ``config.yml`` refers to
``builtins.MyClass``. It also changes the dictionary of a module, which the next reading in the same process sees.
Source: https://github.com/DLR-RM/rl-baselines3-zoo/blob/master/rl_zoo3/exp_manager.py.
"""

import copy
import importlib
import importlib.util
from pathlib import Path
from typing import Any

from rl_zoo3.exp_manager import ExperimentManager

from sb3_ppo_ewma.zoo.patches._replace import AnyFunction, replace_function, upstream_source


def is_needed() -> bool:
    """:return: whether upstream executes the file without a name"""
    source = upstream_source(ExperimentManager.read_hyperparameters)
    return "global_variables: dict = {}" in source and "exec(" in source


def apply() -> None:
    """
    Import a file that Python finds by its name, such as one in the current folder. Raise a ``ValueError`` that names
    the file or module and its mistake.
    """
    replace_function(ExperimentManager, "read_hyperparameters", _read_hyperparameters)


def _read_hyperparameters(upstream: AnyFunction, manager: Any) -> Any:
    if manager.config.endswith((".yml", ".yaml")):
        return upstream(manager)
    config = manager.config
    module = _importable(Path(config)) if config.endswith(".py") else config
    if module is None:
        try:
            return upstream(manager)
        except KeyError as error:
            if error.args != ("hyperparams",):
                raise
            raise _lacks_hyperparams(config) from None
    imported = _imported(config, module)
    hyperparams = imported.hyperparams
    manager.config, imported.hyperparams = module, copy.deepcopy(hyperparams)
    try:
        return upstream(manager)
    finally:
        manager.config, imported.hyperparams = config, hyperparams


def _importable(file: Path) -> str | None:
    """
    :param file: a file of Python
    :return: name by which Python imports this file, if it does
    """
    spec = importlib.util.find_spec(file.stem) if file.is_file() and file.stem.isidentifier() else None
    is_it = spec is not None and spec.origin is not None and Path(spec.origin).exists()
    return file.stem if is_it and file.samefile(str(spec.origin)) else None  # type: ignore[union-attr]


def _imported(config: str, module: str) -> Any:
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # something that the module needs
        raise ValueError(
            f"-conf {config} is neither a file that ends in .yml, .yaml or .py nor a module that can be imported"
        ) from error
    if not isinstance(getattr(imported, "hyperparams", None), dict):
        raise _lacks_hyperparams(config)
    return imported


def _lacks_hyperparams(config: str) -> ValueError:
    return ValueError(f"-conf {config} has no dictionary 'hyperparams' with the names of environments as keys")
