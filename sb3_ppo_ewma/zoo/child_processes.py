"""
Child processes of the zoo's scripts. ``record_training`` and ``benchmark`` start other scripts by name: those would
not know our algorithms, and ``python enjoy.py`` is found in a checkout of the zoo only. Of ffmpeg, they do not look at
the result.
"""

import contextlib
import importlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def brought_home() -> Iterator[None]:
    """
    While it is open, scripts of the zoo that ``subprocess.call`` starts run through this package, and an ffmpeg that
    ``os.system`` starts and that fails raises an ``OSError``.
    """
    call, system = subprocess.call, os.system

    def call_through_us(command: Any, *args: Any, **kwargs: Any) -> int:
        return call(_through_us(command), *args, **kwargs)

    def checked_system(command: str) -> int:
        if not command.startswith("ffmpeg "):
            return system(command)
        status = system(shlex.quote(find_ffmpeg()) + command.removeprefix("ffmpeg"))
        if status != 0:
            raise OSError(f"ffmpeg failed (status {status}): {command}")
        return status

    subprocess.call, os.system = call_through_us, checked_system  # type: ignore[assignment]  # overloads
    try:
        yield
    finally:
        subprocess.call, os.system = call, system


def find_ffmpeg() -> str:
    """
    :return: path of the ffmpeg on the search path, or else of the one that moviepy brings
    :raises FileNotFoundError: if there is none
    """
    path = shutil.which("ffmpeg")
    if path is not None:
        return path
    try:
        return str(importlib.import_module("imageio_ffmpeg").get_ffmpeg_exe())
    except (ImportError, RuntimeError):
        raise FileNotFoundError("ffmpeg was not found: install it, or pip install imageio-ffmpeg") from None


def _through_us(command: Any) -> Any:
    match command:
        case ["python", "-m", str(module), *arguments] if module.startswith("rl_zoo3."):
            script = module.removeprefix("rl_zoo3.")
        case ["python", str(file), *arguments] if file.endswith(".py"):
            script = file.removesuffix(".py")
        case _:
            return command
    return [sys.executable, "-m", "sb3_ppo_ewma.zoo", script, *arguments]
