"""
``-params prox_decay:auto`` raises a ``NameError``, a malformed pair a bare traceback.

Seen in rl_zoo3 2.9.2. ``StoreDict`` evaluates every value as Python, so a word needs two pairs of quotes, one for the
shell and one for Python. Source: ``StoreDict.__call__`` in
https://github.com/DLR-RM/rl-baselines3-zoo/blob/master/rl_zoo3/utils.py.
"""

import argparse
import re

import rl_zoo3.utils
from rl_zoo3.utils import StoreDict

from sb3_ppo_ewma.zoo.patches._replace import AnyFunction, replace_function

_BARE_WORD = re.compile(r"[A-Za-z_][\w.+-]*")


def is_needed() -> bool:
    """:return: whether a word without quotes raises a ``NameError``"""
    parser = argparse.ArgumentParser()
    parser.add_argument("-params", nargs="+", action=StoreDict)
    try:
        parser.parse_args(["-params", "prox_decay:auto"])
    except NameError:
        return True
    return False


def apply() -> None:
    """Read a word that is no Python name as text, and report malformed pairs through argparse."""
    replace_function(StoreDict, "__call__", _store)


def _store(
    upstream: AnyFunction,
    action: argparse.Action,
    parser: argparse.ArgumentParser,
    namespace: argparse.Namespace,
    values: list[str],
    option_string: str | None = None,
) -> None:
    setattr(namespace, action.dest, dict(_read_pair(action, pair) for pair in values))


def _read_pair(action: argparse.Action, pair: str) -> tuple[str, object]:
    name, colon, text = pair.partition(":")
    if not (name and colon and text):
        raise argparse.ArgumentError(action, f"expected NAME:VALUE, got {pair!r}")
    try:
        # Like upstream: Python, in upstream's namespace
        return name, eval(text, vars(rl_zoo3.utils))
    except Exception as error:
        if isinstance(error, NameError | SyntaxError) and _BARE_WORD.fullmatch(text):
            return name, text
        raise argparse.ArgumentError(action, f"cannot read the value of {pair!r}: {error}") from error
