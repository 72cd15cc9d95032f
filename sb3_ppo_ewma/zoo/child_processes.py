"""
Child processes of the zoo's scripts. ``record_training`` and ``benchmark`` run ``record_video`` and ``enjoy`` in
processes of their own, which must know our algorithms too.
"""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from sb3_ppo_ewma.zoo import options


@contextlib.contextmanager
def redirect_child_scripts() -> Iterator[None]:
    """
    Within the context, ``subprocess.call`` runs a script of the zoo as ``python -m sb3_ppo_ewma.zoo SCRIPT``. Other
    commands are unchanged.
    """
    call = subprocess.call

    def redirected_call(command: Any, *args: Any, **kwargs: Any) -> int:
        return call(_redirected(command), *args, **kwargs)

    subprocess.call = redirected_call  # type: ignore[assignment]  # overloads
    try:
        yield
    finally:
        subprocess.call = call


def _redirected(command: Any) -> Any:
    match command:
        case ["python" | sys.executable, "-m", str(module), *arguments] if module.startswith("rl_zoo3."):
            packages = ["--gym-packages", *options.current.gym_packages] if options.current.gym_packages else []
            return [sys.executable, "-m", "sb3_ppo_ewma.zoo", module.removeprefix("rl_zoo3."), *arguments, *packages]
    return command
