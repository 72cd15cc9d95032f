"""
Read ``args.yml`` and ``config.yml`` of a run without running code from them: the tags that the zoo writes are known,
all others are refused.
"""

import argparse
import ast
import importlib
import pathlib
import sys
from collections import OrderedDict
from typing import Any, NamedTuple

import yaml

from sb3_ppo_ewma.checkpointing.restricted_pickle import NotAllowedError, named

# Settings that only training uses. Scripts that run an agent need not know their classes.
_OF_TRAINING = {"callback", "policy", "policy_kwargs", "rollout_buffer_class", "replay_buffer_class"}
_PYTHON = "tag:yaml.org,2002:python/"


class RestrictedLoader(yaml.SafeLoader):
    """
    Plain values, and what the zoo makes of ordered dictionaries, tuples, paths and classes. A class must be one that
    safe loading of models knows, or of a package that ``--gym-packages`` names.
    """


class NotRead(NamedTuple):
    """
    Stands for a class that is not read.

    :param name: of the class, with its module
    :param mark: where it stands
    """

    name: str
    mark: Any


def load(stream: Any) -> Any:
    """
    :param stream: text, or open file
    :return: its contents
    :raises yaml.constructor.ConstructorError: if it has an object that is not known; names the file and the line
    :raises ValueError: if ``normalize``, which the zoo evaluates, is more than a dictionary of plain values
    """
    loaded = yaml.load(stream, Loader=RestrictedLoader)
    for key, value in loaded.items() if isinstance(loaded, dict) else [("", loaded)]:
        if key not in _OF_TRAINING:
            _refuse_unread(value)
    if isinstance(loaded, dict) and isinstance(loaded.get("normalize"), str):
        _check_plain("normalize", loaded["normalize"], getattr(stream, "name", "the file"))
    return loaded


def _refuse_unread(value: Any) -> None:
    if isinstance(value, NotRead):
        raise yaml.constructor.ConstructorError(
            None,
            None,
            f"{value.name} is not read, since it could run code: if you trust it, name its package with --gym-packages",
            value.mark,
        )
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else []:
        _refuse_unread(each)


def _check_plain(key: str, text: str, name: str) -> None:
    """
    :param key: whose value it is
    :param text: Python code that will be evaluated
    :param name: of the file
    """
    try:
        code = ast.parse(text.strip(), mode="eval").body
        is_call = isinstance(code, ast.Call) and isinstance(code.func, ast.Name) and code.func.id == "dict"
        if isinstance(code, ast.Call) and is_call and not code.args:
            for keyword in code.keywords:
                ast.literal_eval(keyword.value)
        else:
            ast.literal_eval(code)
    except (ValueError, SyntaxError, RecursionError) as error:
        raise ValueError(f"{name}: {key}: {text!r} is not a dictionary of plain values, but would be run") from error


def _tuple(loader: RestrictedLoader, node: Any) -> tuple[Any, ...]:
    return tuple(loader.construct_sequence(node, deep=True))


def _ordered_dict(loader: RestrictedLoader, node: Any) -> OrderedDict[Any, Any]:
    return OrderedDict(*loader.construct_sequence(node, deep=True))


def _path(loader: RestrictedLoader, node: Any) -> pathlib.Path:
    return pathlib.Path(*loader.construct_sequence(node, deep=True))


def _class(loader: RestrictedLoader, suffix: str, node: Any) -> Any:
    module, _, name = suffix.rpartition(".")
    try:
        found: Any = named(module, name)
    except NotAllowedError:
        if module.partition(".")[0] not in _trusted_packages():
            return NotRead(suffix, node.start_mark)
        found = getattr(importlib.import_module(module), name)
    return found


def _refuse(loader: RestrictedLoader, suffix: str, node: Any) -> Any:
    raise yaml.constructor.ConstructorError(
        None,
        None,
        f"an object ({suffix}) is not read, since it could run code: write a plain value in its place",
        node.start_mark,
    )


def _trusted_packages() -> set[str]:
    """
    :return: packages that the command line names
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--gym-packages", nargs="+", default=[])
    return {name.partition(".")[0] for name in parser.parse_known_args(sys.argv[1:])[0].gym_packages}


RestrictedLoader.add_constructor(f"{_PYTHON}tuple", _tuple)
RestrictedLoader.add_constructor(f"{_PYTHON}object/apply:collections.OrderedDict", _ordered_dict)
for _module in ("pathlib", "pathlib._local"):
    RestrictedLoader.add_constructor(f"{_PYTHON}object/apply:{_module}.PosixPath", _path)
RestrictedLoader.add_multi_constructor(f"{_PYTHON}name:", _class)
RestrictedLoader.add_multi_constructor(_PYTHON, _refuse)
