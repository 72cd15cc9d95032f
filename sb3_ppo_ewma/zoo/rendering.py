"""Rendering where there is no screen: what ``enjoy`` then shows, and what the errors of the libraries mean."""

import os
import sys
from typing import Any

import gymnasium as gym
from gymnasium.envs.registration import load_env_creator

# Libraries that open windows
LIBRARIES = {"pygame", "glfw", "cv2", "mujoco", "pyglet", "OpenGL"}


def has_screen() -> bool:
    """
    :return: whether windows can be opened, as far as the environment variables tell
    """
    variables = ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER")
    return not sys.platform.startswith("linux") or any(os.environ.get(name) for name in variables)


def check_screen(env_id: str) -> None:
    """
    Say that a window of this environment cannot be seen, before it is opened.

    :param env_id: name of an environment that will be shown in a window
    :raises ValueError: if there is no screen, and the library would end the process instead of raising an error
    """
    if has_screen():
        return
    advice = "there is no screen to render to (DISPLAY is not set): give --no-render, or use record_video"
    if _is_mujoco(env_id):
        raise ValueError(advice)
    print(f"Note: {advice}")


def explain(error: Exception) -> str:
    """
    :param error: error of one of the libraries
    :return: one sentence
    """
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if has_screen():
        return f"rendering failed: {said}"
    return (
        f"rendering failed without a screen (DISPLAY is not set): {said}. Give --no-render; with MUJOCO_GL=egl or "
        "MUJOCO_GL=osmesa in the environment, MuJoCo renders videos without one"
    )


def _is_mujoco(env_id: str) -> bool:
    entry_point: Any = gym.spec(env_id).entry_point
    creator = load_env_creator(entry_point) if isinstance(entry_point, str) else entry_point
    bases = creator.__mro__ if isinstance(creator, type) else [creator]
    return any("mujoco" in f"{base.__module__}.{getattr(base, '__qualname__', '')}".lower() for base in bases)
