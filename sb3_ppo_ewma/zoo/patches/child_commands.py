"""
``benchmark`` runs ``python enjoy.py`` in the current folder, and ``record_training`` whichever ``python`` is first on
the search path.

Seen in rl_zoo3 2.9.2. ``enjoy.py`` is in a checkout of the zoo, not where an installed one runs, so ``benchmark``
evaluates no agent. Sources:
https://github.com/DLR-RM/rl-baselines3-zoo/blob/master/rl_zoo3/benchmark.py and
https://github.com/DLR-RM/rl-baselines3-zoo/blob/master/rl_zoo3/record_training.py.
"""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from sb3_ppo_ewma.zoo.patches._replace import script_source


def is_needed() -> bool:
    """:return: whether the scripts start ``python`` by that name"""
    return any('["python", ' in script_source(f"rl_zoo3.{name}") for name in ("benchmark", "record_training"))


@contextlib.contextmanager
def apply() -> Iterator[None]:
    """Within the context, ``subprocess.call`` starts the zoo's scripts as modules, with the running interpreter."""
    call = subprocess.call

    def patched_call(command: Any, *args: Any, **kwargs: Any) -> int:
        return call(_as_module(command), *args, **kwargs)

    subprocess.call = patched_call  # type: ignore[assignment]  # overloads
    try:
        yield
    finally:
        subprocess.call = call


def _as_module(command: Any) -> Any:
    match command:
        case ["python", "-m", str(module), *arguments] if module.startswith("rl_zoo3."):
            return [sys.executable, "-m", module, *arguments]
        case ["python", "enjoy.py", *arguments]:
            return [sys.executable, "-m", "rl_zoo3.enjoy", *arguments]
    return command
