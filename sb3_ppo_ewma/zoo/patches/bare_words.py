"""
The value of ``NAME:VALUE`` (``-params``, ``--env-kwargs``, …) is Python, also where it is a word.

Seen in rl_zoo3 2.9.2. ``StoreDict`` evaluates every value, so ``prox_decay:auto`` and ``use_sde:false`` raise a
``NameError``, ``mode:max`` is Python's function, and text needs two pairs of quotes, one for the shell and one for
Python. A malformed pair raises a bare traceback. An option that is given again drops the first. Source:
``StoreDict.__call__`` in https://github.com/DLR-RM/rl-baselines3-zoo/blob/master/rl_zoo3/utils.py.
"""

import argparse
import re

import rl_zoo3.utils
import yaml
from rl_zoo3.utils import StoreDict

from sb3_ppo_ewma.zoo.patches._replace import AnyFunction, replace_function
from sb3_ppo_ewma.zoo.python_values import evaluate

_WORD = re.compile(r"~|[-+]?\.[A-Za-z]+|[A-Za-z_][\w+-]*")
# Python, such as nn.ReLU, or else text, such as lin_0.1 or my_package.MyCallback
_DOTTED = re.compile(r"[A-Za-z_][\w.+-]*")


def is_needed() -> bool:
    """:return: whether a word raises a ``NameError``, or is a function of Python's"""
    parser = argparse.ArgumentParser()
    parser.add_argument("-params", nargs="+", action=StoreDict)
    try:
        read = parser.parse_args(["-params", "mode:max", "prox_decay:auto"])
    except NameError:
        return True
    return callable(read.params["mode"])


def apply() -> None:
    """
    Read a word as YAML does: true, false, null, or text. Report malformed pairs through argparse. An option that is
    given again completes the first.
    """
    replace_function(StoreDict, "__call__", _store)


def _store(
    upstream: AnyFunction,
    action: argparse.Action,
    parser: argparse.ArgumentParser,
    namespace: argparse.Namespace,
    values: list[str],
    option_string: str | None = None,
) -> None:
    before = getattr(namespace, action.dest, None) or {}
    setattr(namespace, action.dest, {**before, **dict(_read_pair(action, pair) for pair in values)})


def _read_pair(action: argparse.Action, pair: str) -> tuple[str, object]:
    name, colon, text = pair.partition(":")
    if not (name and colon and text):
        raise argparse.ArgumentError(action, f"expected NAME:VALUE, got {pair!r}")
    if _WORD.fullmatch(text):
        return name, _read_word(text)
    is_dotted = _DOTTED.fullmatch(text)
    try:
        # Like upstream: Python, in upstream's namespace
        return name, (eval if is_dotted else evaluate)(text, vars(rl_zoo3.utils))
    except Exception as error:
        if isinstance(error, NameError | SyntaxError) and is_dotted:
            return name, text
        raise argparse.ArgumentError(action, f"cannot read the value of {pair!r}: {error}") from error


def _read_word(word: str) -> object:
    value: object = yaml.safe_load(word)
    if word == "None" or word == "none":
        return None
    return value if value is None or isinstance(value, bool | float) else word
