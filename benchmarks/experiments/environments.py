"""Environments made for the experiments. Importing this module registers them with Gymnasium."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class CueDoors(gym.Env[np.ndarray, np.int64]):
    """
    A row of rooms with doors. A cue, seen only in the first observation, tells which door is right in the last room.

    In every room but the last, ``n_open`` doors drawn at random are open. An open door leads to the next room; a closed
    one costs a step and ``penalty``, and the open doors are drawn again. In the last room the first ``n_cues`` doors
    are open. Any of them ends the episode, and the one with the number of the cue has a reward of 1.

    Observations show the open doors, so that agents with and without masks know the same. Nothing but the first
    observation depends on the cue.

    :param n_rooms: rooms of an episode
    :param n_doors: doors of a room, the number of actions
    :param n_open: open doors of every room but the last
    :param n_cues: different cues
    :param max_steps: length at which an episode is cut short
    :param penalty: subtracted from the reward for a closed door
    """

    def __init__(self, n_rooms: int, n_doors: int, n_open: int, n_cues: int, max_steps: int, penalty: float) -> None:
        self.n_rooms, self.n_doors, self.n_open, self.n_cues = n_rooms, n_doors, n_open, n_cues
        self.max_steps, self.penalty = max_steps, penalty
        self.action_space = spaces.Discrete(n_doors)
        # The cue, whether this is the last room, the open doors
        self.observation_space = spaces.Box(0.0, 1.0, (n_cues + 1 + n_doors,), np.float32)

    @property
    def _is_last_room(self) -> bool:
        return self._room == self.n_rooms - 1

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
        is_over = False
        reward = 0.0
        if not self._open[action]:
            reward = -self.penalty
        elif self._is_last_room:
            is_over = True
            reward = float(action == self._cue)
        else:
            self._room += 1
        self._open = self._draw_doors()
        return self._observation(), reward, is_over, self._n_steps >= self.max_steps, {}

    def action_masks(self) -> np.ndarray:
        """
        :return: (n_doors,) whether each door is open
        """
        return self._open

    def _draw_doors(self) -> np.ndarray:
        is_open = np.zeros(self.n_doors, dtype=bool)
        if self._is_last_room:
            is_open[: self.n_cues] = True
        else:
            is_open[self.np_random.choice(self.n_doors, self.n_open, replace=False)] = True
        return is_open

    def _observation(self) -> np.ndarray:
        cue = np.zeros(self.n_cues)
        if self._n_steps == 0:
            cue[self._cue] = 1.0
        return np.concatenate([cue, [self._is_last_room], self._open]).astype(np.float32)


_COMMON = {"n_rooms": 5, "n_cues": 4, "max_steps": 20, "penalty": 0.05}
# With closed doors, and with none: only the cue has to be remembered
CUE_DOORS, CUE = "CueDoors-v0", "Cue-v0"
for _name, _doors in ((CUE_DOORS, {"n_doors": 24, "n_open": 2}), (CUE, {"n_doors": 4, "n_open": 4})):
    gym.register(_name, entry_point=CueDoors, kwargs={**_COMMON, **_doors})
