"""
Environments of the battery: as small as the thing under test allows.
"""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

ACTION_SPACES: dict[str, spaces.Space[Any]] = {
    "box": spaces.Box(-2, 2, (2,), np.float32),
    "box_float64": spaces.Box(-2, 2, (2,), np.float64),
    "box_matrix": spaces.Box(-1, 1, (2, 2), np.float32),
    "discrete": spaces.Discrete(3),
    "multidiscrete": spaces.MultiDiscrete([3, 2]),
    "multibinary": spaces.MultiBinary(3),
}
VECTOR = spaces.Box(-1, 1, (3,), np.float32)
OBSERVATION_SPACES: dict[str, spaces.Space[Any]] = {
    "vector": VECTOR,
    "vector_float64": spaces.Box(-1, 1, (3,), np.float64),
    "matrix": spaces.Box(-1, 1, (3, 2), np.float32),
    "discrete": spaces.Discrete(5),
    "multidiscrete": spaces.MultiDiscrete([4, 3]),
    "multibinary": spaces.MultiBinary(6),
    "multibinary_matrix": spaces.MultiBinary([3, 2]),
    "image_channels_last": spaces.Box(0, 255, (36, 36, 3), np.uint8),
    "image_channels_first": spaces.Box(0, 255, (3, 36, 36), np.uint8),
    "dict": spaces.Dict(
        {
            "image": spaces.Box(0, 255, (36, 36, 1), np.uint8),
            "vector": VECTOR,
            "vector_float64": spaces.Box(-1, 1, (2,), np.float64),
            "discrete": spaces.Discrete(4),
        }
    ),
}


class SpaceEnv(gym.Env[Any, Any]):
    """
    Samples of the observation space, standard normal rewards (or a constant one), truncated after some steps. Keeps the
    actions it was given.

    :param observation_space: of the environment
    :param action_space: of the environment
    :param episode_length: steps until truncation
    :param reward: the same in every step; ``None``: random
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any] = VECTOR,
        action_space: spaces.Space[Any] | str = "discrete",
        episode_length: int = 8,
        reward: float | None = None,
    ) -> None:
        # Spaces hold a random generator: the copies keep environments independent of each other.
        self.observation_space = deepcopy(observation_space)
        self.action_space = deepcopy(ACTION_SPACES[action_space] if isinstance(action_space, str) else action_space)
        self.episode_length = episode_length
        self.constant_reward = reward
        self.actions: list[Any] = []
        self.n_steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.n_steps = 0
        return self.observation(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.n_steps += 1
        self.actions.append(action)
        return self.observation(), self.reward(), False, self.n_steps >= self.episode_length, {}

    def observation(self) -> Any:
        return self.observation_space.sample()

    def reward(self) -> float:
        return float(self.np_random.normal()) if self.constant_reward is None else self.constant_reward


class MaskedSpaceEnv(SpaceEnv):
    """
    A :class:`SpaceEnv` in which a value of every action is invalid at every other step. Fails when one is taken.
    """

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        masks = np.split(self.action_masks(), np.cumsum(self.sizes)[:-1])
        assert all(mask[int(value)] for mask, value in zip(masks, np.ravel(action), strict=True))
        return super().step(action)

    @property
    def sizes(self) -> list[int]:
        """:return: numbers of values of the actions"""
        space: Any = self.action_space
        if isinstance(space, spaces.Discrete):
            return [int(space.n)]
        return [2] * space.n if isinstance(space, spaces.MultiBinary) else [int(size) for size in space.nvec]

    def action_masks(self) -> np.ndarray:
        """:return: True for valid values"""
        times = [self.n_steps + i for i in range(len(self.sizes))]
        invalid = [time % size if time % 2 else None for time, size in zip(times, self.sizes, strict=True)]
        return np.concatenate([np.arange(size) != i for size, i in zip(self.sizes, invalid, strict=True)])


class EpisodeEnv(gym.Env[Any, Any]):
    """
    Four steps, reward 1 in the last one; the end is a termination or a truncation.

    :param truncates: whether the end is a truncation
    """

    def __init__(self, truncates: bool = False) -> None:
        self.observation_space = VECTOR
        self.action_space = spaces.Discrete(2)
        self.truncates = truncates
        self.n_steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.n_steps = 0
        return np.zeros(3, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.n_steps += 1
        end = self.n_steps == 4
        return np.zeros(3, np.float32), float(end), end and not self.truncates, end and self.truncates, {}


class BrokenEnv(SpaceEnv):
    """
    A :class:`SpaceEnv` that goes wrong in one step.

    :param quantity: "observation" or "reward"
    :param value: what it then is
    :param step: counted from the first one over all episodes
    """

    def __init__(self, quantity: str, value: float, step: int) -> None:
        super().__init__()
        self.quantity, self.value, self.broken_step = quantity, value, step

    def _is(self, quantity: str) -> bool:
        return self.quantity == quantity and len(self.actions) == self.broken_step

    def observation(self) -> Any:
        return np.full(3, self.value, np.float32) if self._is("observation") else super().observation()

    def reward(self) -> float:
        return self.value if self._is("reward") else super().reward()


def box_env() -> SpaceEnv:
    """:return: a vector in, a vector out"""
    return SpaceEnv(action_space="box")


def copies(make: Callable[[], gym.Env[Any, Any]], n_envs: int) -> list[Callable[[], gym.Env[Any, Any]]]:
    """
    :param make: makes one environment
    :param n_envs: how many
    :return: for a vectorised environment
    """
    return [make for _ in range(n_envs)]
