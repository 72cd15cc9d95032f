"""Change a function of another library from outside."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

Function = Callable[..., Any]


def replace(owner: Any, name: str, function: Function) -> None:
    """
    Put a function in the place of ``owner.name``. It is called with the upstream function first, then with what that
    one is called with.

    :param owner: class or module
    :param name: of its method or function
    :param function: the replacement
    """
    upstream = getattr(owner, name)

    @functools.wraps(upstream)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return function(upstream, *args, **kwargs)

    is_static = isinstance(inspect.getattr_static(owner, name), staticmethod)
    setattr(owner, name, staticmethod(replacement) if is_static else replacement)
