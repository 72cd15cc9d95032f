"""Python in the zoo's files and on its command line, such as ``policy_kwargs: "dict(activation_fn=torch.nn.ReLU)"``."""

import ast
import builtins
import importlib
from collections.abc import Mapping
from typing import Any


def evaluate(text: str, namespace: Mapping[str, Any]) -> Any:
    """
    :param text: Python
    :param namespace: names that it may use; others may have their module in front, as ``torch.nn.ReLU``
    :return: its value
    :raises NameError: if it names neither, with other errors of Python's
    """
    names = dict(namespace)
    for dotted in _dotted_names(text):
        root = dotted.partition(".")[0]
        if root not in namespace and not hasattr(builtins, root):
            names |= _imported(dotted)
    try:
        return eval(text, names)
    except NameError as error:
        raise NameError(f"there is no module or name {error.name}", name=error.name) from error


def _dotted_names(text: str) -> list[str]:
    """
    :param text: Python
    :return: the dotted names in it, such as ``torch.nn.ReLU``; none if it cannot be read
    """
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except SyntaxError:
        return []
    found = [ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)]
    return [name for name in found if all(part.isidentifier() for part in name.split("."))]


def _imported(dotted: str) -> dict[str, Any]:
    """
    :param dotted: name of something in a module, with the module's
    :return: the package of the module by its name, after the module is imported; empty if there is none
    """
    root, *others = dotted.split(".")[:-1]
    try:
        module = package = importlib.import_module(root)
        for part in others:
            if not hasattr(module, part):
                importlib.import_module(f"{module.__name__}.{part}")
            module = getattr(module, part)
    except ModuleNotFoundError as error:
        if error.name is None or not dotted.startswith(error.name):
            raise  # something that the module needs
        return {} if error.name == root else {root: package}
    return {root: package}
