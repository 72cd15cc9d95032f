"""Action masks of environments for the masked algorithms, which call ``action_masks()``."""

from typing import Any

import gymnasium as gym
import numpy as np


class InfoActionMasker(gym.Wrapper[Any, Any, Any, Any]):
    """
    Gives masked algorithms the masks that an environment puts into its information, as Gymnasium's Taxi does.

    .. code-block:: python

        env = InfoActionMasker(gym.make("Taxi-v4"))

    :param env: environment whose ``reset`` and ``step`` return the mask of the next action
    :param key: key of the mask in the information
    """

    def __init__(self, env: gym.Env[Any, Any], key: str = "action_mask") -> None:
        super().__init__(env)
        self.key = key
        self._mask: np.ndarray | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """
        :param seed: seed of the environment
        :param options: options of the environment
        :return: first observation, information
        :raises ValueError: if the information has no mask
        """
        observation, info = self.env.reset(seed=seed, options=options)
        self._keep_mask(info)
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """
        :param action: action
        :return: observation, reward, whether the episode terminated, whether it was truncated, information
        :raises ValueError: if the information has no mask
        """
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._keep_mask(info)
        return observation, reward, terminated, truncated, info

    def action_masks(self) -> np.ndarray:
        """
        :return: whether each action is valid now
        :raises ValueError: before the first ``reset``
        """
        if self._mask is None:
            raise ValueError("action_masks() needs reset() first")
        return self._mask

    def _keep_mask(self, info: dict[str, Any]) -> None:
        if self.key not in info:
            known = ", ".join(map(repr, info)) or "nothing"
            raise ValueError(f"key must name a mask in the information, got {self.key!r}; there is {known}")
        self._mask = np.asarray(info[self.key], dtype=bool)
