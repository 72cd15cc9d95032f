"""Environments made for the experiments, registered with Gymnasium when this module is imported."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class CueDoors(gym.Env[np.ndarray, np.int64]):
    """
    A row of rooms with doors, and a cue at the beginning that says which door is right at the end.

    The cue is seen only in the first observation. In every room but the last, ``n_open`` doors drawn at random are open;
    an open door leads to the next room, a closed one costs a step and the open doors are drawn anew. In the last room
    the first ``n_cues`` doors are open, and the one with the number of the cue is right. The return is 1 if it was
    chosen, and 0 for another door or when time is up.

    Which doors are open is in every observation and, as :meth:`action_masks`, in the masks: an agent without masks can
    know as much as one with masks, but has to learn what closed doors are.

    :param n_rooms: rooms, at least 2
    :param n_doors: doors of a room, the number of actions
    :param n_open: of these, open ones in all rooms but the last
    :param n_cues: different cues
    :param max_steps: after which time is up
    """

    def __init__(self, n_rooms: int, n_doors: int, n_open: int, n_cues: int, max_steps: int) -> None:
        self.n_rooms, self.n_doors, self.n_open, self.n_cues = n_rooms, n_doors, n_open, n_cues
        self.max_steps = max_steps
        self.action_space = spaces.Discrete(n_doors)
        # The cue, whether this is the last room, the open doors
        self.observation_space = spaces.Box(0.0, 1.0, (n_cues + 1 + n_doors,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self._cue = self.np_random.integers(self.n_cues)
        self._room = self._n_steps = 0
        self._open = self._draw_doors()
        return self._observation(), {}

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self._n_steps += 1
        is_last = self._room == self.n_rooms - 1
        is_open = bool(self._open[action])
        reward = float(is_last and is_open and action == self._cue)
        self._room += is_open and not is_last
        self._open = self._draw_doors()
        return self._observation(), reward, is_last and is_open, self._n_steps >= self.max_steps, {}

    def action_masks(self) -> np.ndarray:
        """
        :return: (n_doors,) whether each door is open
        """
        return self._open

    def _draw_doors(self) -> np.ndarray:
        is_open = np.zeros(self.n_doors, dtype=bool)
        if self._room == self.n_rooms - 1:
            is_open[: self.n_cues] = True
        else:
            is_open[self.np_random.choice(self.n_doors, self.n_open, replace=False)] = True
        return is_open

    def _observation(self) -> np.ndarray:
        observation = np.zeros(self.observation_space.shape, dtype=np.float32)  # type: ignore[arg-type]
        if self._n_steps == 0:
            observation[self._cue] = 1.0
        observation[self.n_cues] = self._room == self.n_rooms - 1
        observation[self.n_cues + 1 :] = self._open
        return observation
