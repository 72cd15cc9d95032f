"""
``env_wrapper`` with sb3-contrib's ``ActionMasker`` does not find the method that ``action_mask_fn`` names.

Seen in sb3-contrib 2.9.2. A file can only name a method, and ``ActionMasker`` looks for it in the outermost wrapper.
Since Gymnasium 1.0, wrappers do not pass on attributes of the environment
(https://github.com/Farama-Foundation/Gymnasium/issues/836). Source:
https://github.com/Stable-Baselines-Team/stable-baselines3-contrib/blob/master/sb3_contrib/common/wrappers/action_masker.py.
"""

from typing import Any

import gymnasium as gym
import sb3_contrib.common.wrappers
from sb3_contrib.common.wrappers import action_masker


class _Masked(gym.Env[Any, Any]):
    def valid_actions(self, env: Any) -> None:
        """Something that ``action_mask_fn`` can name."""


def is_needed() -> bool:
    """:return: whether a method is not found behind a wrapper"""
    try:
        action_masker.ActionMasker(gym.Wrapper(_Masked()), "valid_actions")
    except AttributeError:
        return True
    return False


def apply() -> None:
    """Look for the method in all wrappers and in the environment."""

    # A class of this function, so that it is pickled by value: processes of a SubprocVecEnv have no patches.
    class ActionMasker(action_masker.ActionMasker):
        def __init__(self, env: gym.Env[Any, Any], action_mask_fn: Any) -> None:
            if isinstance(action_mask_fn, str):
                if not env.has_wrapper_attr(action_mask_fn) or not callable(env.get_wrapper_attr(action_mask_fn)):
                    raise ValueError(f"action_mask_fn must name a method of the environment, got {action_mask_fn!r}")
                action_mask_fn = env.get_wrapper_attr(action_mask_fn)
            super().__init__(env, action_mask_fn)

    for module in (action_masker, sb3_contrib.common.wrappers):
        module.ActionMasker = ActionMasker  # type: ignore[attr-defined]  # a class by the name of its base
