"""Environments whose methods act in another process."""

import weakref
from collections.abc import Callable
from typing import Any

from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_ewma._parallel.shared_state import layers

# Methods that only read what this process has, too
_LOCAL = {"close", "getattr_depth_check", "getattr_recursive", "set_venv", "save", "load", "get_original_reward",
          "normalize_obs", "normalize_reward", "unnormalize_obs", "unnormalize_reward"}  # fmt: skip


class RemoteMethods:
    """
    Lets the public methods of environments, and of all that they wrap, act elsewhere.

    :param env: environments
    :param call: called with the depth of a wrapper (0: the outermost), the name of a method and its arguments
    :param close: called before the environments are closed
    """

    def __init__(self, env: VecEnv, call: Callable[..., Any], close: Callable[[], None]) -> None:
        self._replaced: list[tuple[weakref.ref[Any], set[str]]] = []
        for depth, layer in enumerate(layers(env)):
            names = {name for name in _public_methods(type(layer)) if name not in vars(layer)}
            methods = {name: _remote(call, depth, name) for name in names}
            methods["close"] = _closing(weakref.ref(layer), close)
            # VecNormalize is pickled to save its statistics; functions in the place of methods could not be.
            methods["__getstate__"] = _getstate_without(weakref.ref(layer), {*methods, "__getstate__"})
            for name, method in methods.items():
                setattr(layer, name, method)
            self._replaced.append((weakref.ref(layer), set(methods)))

    def restore(self) -> None:
        """Let the methods act in this process again."""
        for reference, names in self._replaced:
            layer = reference()
            for name in names if layer is not None else ():
                vars(layer).pop(name, None)
        self._replaced = []


def _public_methods(cls: type) -> set[str]:
    """
    :param cls: class of environments
    :return: names of the methods that another process has to call
    """
    found = {name: value for each in reversed(cls.__mro__) for name, value in vars(each).items()}
    methods = {name for name, value in found.items() if callable(value) and not isinstance(value, type)}
    return {name for name in methods if not name.startswith("_")} - _LOCAL


def _remote(call: Callable[..., Any], depth: int, name: str) -> Callable[..., Any]:
    def method(*args: Any, **kwargs: Any) -> Any:
        return call(depth, name, *args, **kwargs)

    return method


def _closing(layer: "weakref.ref[Any]", close: Callable[[], None]) -> Callable[[], None]:
    def method() -> None:
        try:
            close()
        finally:
            own = layer()
            if own is not None:
                vars(own).pop("close", None)
                own.close()  # the method of its class again

    return method


def _getstate_without(layer: "weakref.ref[Any]", replaced: set[str]) -> Callable[[], dict[str, Any]]:
    def getstate() -> dict[str, Any]:
        own: Any = layer()
        method = getattr(type(own), "__getstate__", None)  # since Python 3.11 every class has it
        attributes = vars(own) if method is None else method(own)
        return {name: value for name, value in attributes.items() if name not in replaced}

    return getstate
