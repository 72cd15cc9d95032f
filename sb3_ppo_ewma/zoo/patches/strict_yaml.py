"""
A file of hyper-parameters gives a key twice, and the first value is lost; ``1e-3`` is text; an empty file raises an
``AttributeError``.

Seen in rl_zoo3 2.9.2 with PyYAML 6.0. ``ExperimentManager.read_hyperparameters`` reads files with
``yaml.safe_load``, which follows YAML 1.1 (a number with an exponent needs a dot and a sign,
https://github.com/yaml/pyyaml/issues/173) and does not check for duplicate keys
(https://github.com/yaml/pyyaml/issues/165), and uses the result without a check. Source:
https://github.com/DLR-RM/rl-baselines3-zoo/blob/master/rl_zoo3/exp_manager.py.
"""

import re
import types
from collections.abc import Mapping
from typing import Any

import yaml
from rl_zoo3 import exp_manager

_EXPONENT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+\Z")  # as in YAML 1.2
_FLOAT, _MERGE = "tag:yaml.org,2002:float", "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """Reads numbers such as 1e-3."""


class Dumper(yaml.SafeDumper):
    """Writes what :func:`load` reads: text such as 1e-3 with quotes."""


for _class in (_Loader, Dumper):
    _class.add_implicit_resolver(_FLOAT, _EXPONENT, list("-+.0123456789"))


class _Entries(dict[str, Any]):
    """Entries of a file, each of which must be a mapping where it is used."""

    def __init__(self, entries: Mapping[str, Any], file: str) -> None:
        super().__init__(entries)
        self.file = file

    def __getitem__(self, name: str) -> Any:
        entry = super().__getitem__(name)
        if not isinstance(entry, dict):
            raise ValueError(
                f"{self.file}: the entry {name} must map names of hyper-parameters to values, got {entry!r}"
            )
        return entry

    def __missing__(self, name: str) -> Any:
        raise ValueError(f"{self.file} has no entry {name}")


def is_needed() -> bool:
    """:return: whether a key that is given twice is accepted"""
    try:
        vars(exp_manager)["yaml"].safe_load("{A: {gamma: 0.9, gamma: 0.99}}")
    except ValueError:
        return False
    return True


def apply() -> None:
    """Read files of hyper-parameters with :func:`load`."""
    vars(exp_manager)["yaml"] = types.SimpleNamespace(**{**vars(yaml), "safe_load": load})


def load(stream: Any) -> Any:
    """
    :param stream: YAML as text, or an open file
    :return: its entries by name
    :raises ValueError: if it is empty or not a mapping, or gives a key twice
    :raises yaml.YAMLError: if it is not YAML
    """
    file = str(getattr(stream, "name", "YAML"))
    loader = _Loader(stream)
    try:
        node = loader.get_single_node()
        if node is None:
            raise ValueError(f"{file} is empty: it must map names of environments to their hyper-parameters")
        _check_keys(node, file, (), set())
        entries = loader.construct_document(node)
    finally:
        loader.dispose()
    if not isinstance(entries, dict):
        raise ValueError(f"{file} must map names of environments to their hyper-parameters, got {entries!r}")
    return _Entries(entries, file)


def _check_keys(node: yaml.Node, file: str, path: tuple[str, ...], visited: set[int]) -> None:
    """
    :param node: part of a document
    :param file: name of the file
    :param path: keys that lead to the node
    :param visited: nodes that were checked: an anchor can be used several times
    :raises ValueError: if a key is given twice
    """
    if id(node) in visited or isinstance(node, yaml.ScalarNode):
        return
    visited.add(id(node))
    if not isinstance(node, yaml.MappingNode):
        for each in node.value:
            _check_keys(each, file, path, visited)
        return
    lines: dict[tuple[str, str], int] = {}
    for key, value in node.value:
        name, line = (key.tag, str(key.value)), key.start_mark.line + 1
        if name in lines and key.tag != _MERGE:
            place = f"the entry {path[0]} gives " if path else ""
            where = f"lines {lines[name]} and {line}"
            raise ValueError(f"{file}: {place}{'.'.join([*path[1:], name[1]])} twice ({where})")
        lines[name] = line
        _check_keys(value, file, (*path, name[1]), visited)
