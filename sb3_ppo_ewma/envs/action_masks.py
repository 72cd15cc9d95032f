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


class MiniGridActionMasker(gym.Wrapper[Any, Any, Any, Any]):
    """
    Masks the actions of MiniGrid that have no effect now: going forward against an obstacle, picking up what is not
    there, dropping without a free cell, toggling what is neither a door nor a box. It reveals nothing that the observed
    cell in front of the agent does not show. The action ``done`` stays valid.

    .. code-block:: python

        env = MiniGridActionMasker(FlatObsWrapper(gym.make("MiniGrid-MemoryS7-v0")))

    :param env: environment of MiniGrid, wrapped or not
    """

    def action_masks(self) -> np.ndarray:
        """
        :return: whether each action has an effect now
        """
        grid: Any = self.unwrapped
        ahead, carries = grid.grid.get(*grid.front_pos), grid.carrying is not None
        masks = np.ones(len(grid.actions), dtype=bool)
        masks[grid.actions.forward] = ahead is None or ahead.can_overlap()
        masks[grid.actions.pickup] = ahead is not None and ahead.can_pickup() and not carries
        masks[grid.actions.drop] = ahead is None and carries
        masks[grid.actions.toggle] = ahead is not None and ahead.type in ("door", "box")
        return masks
