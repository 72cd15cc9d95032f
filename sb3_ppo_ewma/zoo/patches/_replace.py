"""Tools for changing functions of another library at run time."""

import argparse
import contextlib
import functools
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

AnyFunction = Callable[..., Any]


def replace_function(owner: Any, name: str, replacement: AnyFunction) -> None:
    """
    Replace ``owner.name`` by a function that can call the original.

    Callers pass the arguments they always passed. The replacement receives the original function in front of them, as
    ``replacement(upstream, *args, **kwargs)``, and decides whether and how to call it. Replacing a function twice
    nests the replacements: the later one runs first and its ``upstream`` is the earlier one.

    :param owner: class or module that holds the function
    :param name: name of the method or function
    :param replacement: called in place of ``owner.name``
    """
    upstream = getattr(owner, name)

    @functools.wraps(upstream)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        return replacement(upstream, *args, **kwargs)

    is_static = isinstance(inspect.getattr_static(owner, name), staticmethod)
    setattr(owner, name, staticmethod(replaced) if is_static else replaced)


def upstream_source(function: AnyFunction) -> str:
    """
    Feature check for defects that only a training run would show: look for the defective line.

    :param function: function of the other library, replaced or not
    :return: source code of the original
    """
    return inspect.getsource(inspect.unwrap(function))


def script_source(module: str) -> str:
    """
    Feature check for scripts, which run when they are imported: read them instead.

    :param module: full name of a script's module, such as ``rl_zoo3.benchmark``
    :return: its source code
    """
    package, *names = module.split(".")
    spec = importlib.util.find_spec(package)  # that of a submodule would import the packages above it
    folder = Path(spec.origin).parent if spec is not None and spec.origin is not None else Path()
    file = folder.joinpath(*names).with_suffix(".py")
    return file.read_text(encoding="utf-8") if spec is not None and file.is_file() else ""


@contextlib.contextmanager
def parsed_arguments(check: Callable[[argparse.ArgumentParser, argparse.Namespace], None]) -> Iterator[None]:
    """
    Within the context, call a function with what the first parser has parsed: a script parses its arguments before it
    does anything else.

    :param check: called with the parser and its result, which it may change or refuse
    """
    parse_args = argparse.ArgumentParser.parse_args
    is_first = True

    def checked(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        nonlocal is_first
        arguments = parse_args(parser, *args, **kwargs)
        if is_first:
            is_first = False
            check(parser, arguments)
        return arguments

    argparse.ArgumentParser.parse_args = checked  # type: ignore[assignment,method-assign]  # overloads
    try:
        yield
    finally:
        argparse.ArgumentParser.parse_args = parse_args  # type: ignore[method-assign]


@contextlib.contextmanager
def replaced(owner: Any, name: str, replacement: AnyFunction) -> Iterator[None]:
    """
    Within the context, :func:`replace_function`.

    :param owner: class or module that holds the function
    :param name: name of the method or function
    :param replacement: called in place of ``owner.name``, with the original in front of its arguments
    """
    before = inspect.getattr_static(owner, name)
    replace_function(owner, name, replacement)
    try:
        yield
    finally:
        setattr(owner, name, before)
