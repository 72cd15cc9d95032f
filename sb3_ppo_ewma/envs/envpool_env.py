"""
EnvPool's tasks as single Gymnasium environments, for code that needs one environment at a time.
:class:`~sb3_ppo_ewma.envs.envpool_vec_env.EnvPoolVecEnv` steps many at once and is faster.
"""

from collections.abc import Iterable
from typing import Any

import gymnasium as gym
import numpy as np

from sb3_ppo_ewma.envs.envpool_vec_env import EnvPoolVecEnv

PROCGEN_GAMES = (
    "Bigfish",
    "Bossfight",
    "Caveflyer",
    "Chaser",
    "Climber",
    "Coinrun",
    "Dodgeball",
    "Fruitbot",
    "Heist",
    "Jumper",
    "Leaper",
    "Maze",
    "Miner",
    "Ninja",
    "Plunder",
    "Starpilot",
)
PROCGEN = tuple(f"{game}{mode}-v0" for game in PROCGEN_GAMES for mode in ("Easy", "Hard"))


class EnvPoolEnv(gym.Env[Any, Any]):
    """
    A Gymnasium environment on a pool of one.

    :param task_id: EnvPool's name of the task
    :param render_mode: ``"rgb_array"``, ``"human"`` (a window, needs OpenCV) or ``None``
    :param options: options of the task, as ``envpool.make`` takes them
    :raises ImportError: if EnvPool is not installed
    :raises ValueError: if EnvPool has no such task, the task no such option, or SB3 no such spaces
    """

    metadata = {"render_modes": ["rgb_array", "human"], "render_fps": 30}  # noqa: RUF012  # as in Gymnasium

    def __init__(self, task_id: str, render_mode: str | None = None, **options: Any) -> None:
        self._envs = EnvPoolVecEnv(task_id, 1, render_mode=render_mode, **options)
        self.observation_space = self._envs.observation_space
        self.action_space = self._envs.action_space
        self.render_mode = render_mode
        self._next_observation: Any = None  # first observation of an episode that the last step() started

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """
        :param seed: seed of a new pool; ``None`` continues with the current pool
        :param options: must be empty or ``None``; pass EnvPool's options to the constructor
        :return: first observation, information
        :raises ValueError: if there are options
        """
        super().reset(seed=seed)
        self._envs.set_options(options)
        if seed is not None:
            self._envs.seed(seed)
        # The pool started the next episode when the last one ended. Keep it: in Atari it may be the game's next life.
        continues = seed is None and self._next_observation is not None
        observation = self._next_observation if continues else _first(self._envs.reset())
        self._next_observation = None
        return observation, self._envs.reset_infos[0]

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """
        :param action: element of the action space
        :return: observation, reward, terminated, truncated, information
        :raises RuntimeError: if the episode is over or none has started
        """
        if self._next_observation is not None:
            raise RuntimeError("step() after the end of an episode: call reset() first")
        observations, rewards, dones, infos = self._envs.step(np.asarray(action)[None])
        info = infos[0]
        truncated = info.pop("TimeLimit.truncated")
        info.pop("episode", None)  # Monitor adds its own
        observation = _first(observations)
        if dones[0]:
            self._next_observation = observation
            observation = _with_numpy_scalars(info.pop("terminal_observation"))
        return observation, float(rewards[0]), bool(dones[0]) and not truncated, truncated, info

    def render(self) -> Any:
        """
        :return: an image, (height, width, 3), uint8; ``None`` if it is shown in a window
        """
        return self._envs.render() if self.render_mode is not None else None

    def close(self) -> None:
        """Close the pool."""
        self._envs.close()


def _first(observations: Any) -> Any:
    """
    :param observations: observations of one environment, (1, …)
    :return: observation of that environment, (…)
    """
    is_dict = isinstance(observations, dict)
    return _with_numpy_scalars({name: each[0] for name, each in observations.items()} if is_dict else observations[0])


def _with_numpy_scalars(observation: Any) -> Any:
    """
    :param observation: array, number or a dict of these
    :return: the observation with numbers as ``np.int64``, Gymnasium's type for elements of ``Discrete``
    """
    if isinstance(observation, dict):
        return {name: _with_numpy_scalars(each) for name, each in observation.items()}
    return np.int64(observation) if np.ndim(observation) == 0 else observation


class EnvPoolAtariEnv(EnvPoolEnv):
    """An Atari game; rl-zoo3 recognises Atari by the name of this class."""


def register(task_ids: Iterable[str], env_class: type[EnvPoolEnv] = EnvPoolEnv) -> None:
    """
    Register tasks of EnvPool with Gymnasium under their own names, except names that are already registered.

    :param task_ids: names of the tasks
    :param env_class: class of their environments
    """
    for task_id in task_ids:
        if task_id not in gym.registry:
            gym.register(task_id, entry_point=f"{__name__}:{env_class.__name__}", kwargs={"task_id": task_id})
