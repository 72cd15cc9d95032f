"""Pass SB3's constructor parameters through without repeating them, and still show them to ``help`` and check them."""

import difflib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any


def merged_signature(cls: type) -> inspect.Signature:
    """
    Signature of a class whose ``__init__`` passes ``*args, **kwargs`` on to the next class: the next class's parameters
    in their order, then the keyword-only ones of the classes before it.

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
        for parameter in named:
            if parameter.kind is parameter.KEYWORD_ONLY:
                own.setdefault(parameter.name, parameter)
            else:
                positional.append(parameter)
        if not passes_on or any(p.kind is not p.KEYWORD_ONLY for p in named):
            break
    names = {parameter.name for parameter in positional}
    return inspect.Signature([*positional, *(p for name, p in own.items() if name not in names)])


def bind_arguments(cls: type, base: type, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """
    Bind positional and keyword arguments to the parameters of a base class's constructor.

    :param cls: class under construction, for the message
    :param base: class whose ``__init__`` will be called
    :param args: positional arguments
    :param kwargs: keyword arguments
    :return: arguments by name, defaults included
    :raises TypeError: as Python does, with the nearest name for a misspelled one
    """
    signature = merged_signature(base)
    unknown = [name for name in kwargs if name not in signature.parameters]
    if unknown:
        close = difflib.get_close_matches(unknown[0], list(merged_signature(cls).parameters), n=1)
        hint = f". Did you mean {close[0]!r}?" if close else ""
        raise TypeError(f"{cls.__name__}() got an unexpected keyword argument {unknown[0]!r}{hint}")
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{cls.__name__}() {error}") from None
    bound.apply_defaults()
    return dict(bound.arguments)
