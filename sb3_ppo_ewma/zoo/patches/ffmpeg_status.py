"""
``record_training`` does not notice that ffmpeg is missing or fails.

Seen in rl_zoo3 2.9.2. It ignores the status of ``os.system("ffmpeg ...")``: it prints "Saving video to ..." without a
video, after it deleted the old ones. Source:
https://github.com/DLR-RM/rl-baselines3-zoo/blob/master/rl_zoo3/record_training.py.
"""

import contextlib
import importlib
import os
import shlex
import shutil
from collections.abc import Iterator

from sb3_ppo_ewma.zoo.patches._replace import script_source


def is_needed() -> bool:
    """:return: whether the script starts ffmpeg through ``os.system``"""
    return 'os.system(f"ffmpeg' in script_source("rl_zoo3.record_training")


@contextlib.contextmanager
def apply() -> Iterator[None]:
    """Within the context, ``os.system`` raises an ``OSError`` if a command of ffmpeg fails."""
    system = os.system

    def patched_system(command: str) -> int:
        if not command.startswith("ffmpeg "):
            return system(command)
        status = system(shlex.quote(find_ffmpeg()) + command.removeprefix("ffmpeg"))
        if status != 0:
            raise OSError(f"ffmpeg failed (status {status}): {command}")
        return status

    os.system = patched_system  # type: ignore[assignment]  # the scripts pass strings
    try:
        yield
    finally:
        os.system = system


def find_ffmpeg() -> str:
    """
    :return: path of the ffmpeg on the search path, else of the one that moviepy installs
    :raises FileNotFoundError: if there is none
    """
    path = shutil.which("ffmpeg")
    if path is not None:
        return path
    try:
        return str(importlib.import_module("imageio_ffmpeg").get_ffmpeg_exe())
    except (ImportError, RuntimeError):
        raise FileNotFoundError("ffmpeg was not found: install it, or pip install imageio-ffmpeg") from None
