"""Environments that raise an error for every invalid action, for tests of action masks."""

from typing import Any

import gymnasium as gym
import numpy as np

N_ACTIONS = 6


class Masked(gym.Env[np.ndarray, int]):
    """
    Two actions of six are valid, others at every step. The observation does not show which, so that a policy without
    masks soon takes an invalid one.
    """

    metadata = {"render_modes": ["human", "rgb_array"], "render_fps": 30}  # noqa: RUF012  # as in Gymnasium

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self.observation_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.action_space = gym.spaces.Discrete(N_ACTIONS)  # type: ignore[assignment]  # numpy's integers

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        return self._next(), {"mask": self._mask}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        if not self._mask[action]:
            raise ValueError(f"action {action} is invalid, the mask is {self._mask}")
        return self._next(), 1.0, False, False, {"mask": self._mask}

    def render(self) -> Any:
        return np.zeros((32, 32, 3), np.uint8) if self.render_mode == "rgb_array" else None

    def action_masks(self) -> np.ndarray:
        return self._mask

    def _next(self) -> np.ndarray:
        self._mask = np.zeros(N_ACTIONS, dtype=bool)
        self._mask[self.np_random.choice(N_ACTIONS, size=2, replace=False)] = True
        return np.zeros(2, np.float32)


class Unmasked(Masked):
    """The same without a method ``action_masks``; the mask is in the information, and in a method of another name."""

    @property
    def action_masks(self) -> Any:  # type: ignore[override]
        raise AttributeError("action_masks")

    def valid_actions(self, env: gym.Env[Any, Any]) -> np.ndarray:
        """:param env: the environment, which ``ActionMasker`` passes"""
        return self._mask


gym.register("Masked-v0", entry_point="tests.masked_envs:Masked", max_episode_steps=8)
gym.register("Unmasked-v0", entry_point="tests.masked_envs:Unmasked", max_episode_steps=8)
