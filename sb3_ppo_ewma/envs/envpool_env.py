"""
EnvPool's tasks as single environments of Gymnasium, for wrappers, scripts and vectorised environments that want one at
a time. Where speed counts, :class:`~sb3_ppo_ewma.envs.envpool_vec_env.EnvPoolVecEnv` steps many at once.
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
    A pool of one environment.

    :param task_id: EnvPool's name of the task
    :param render_mode: ``"rgb_array"``, ``"human"`` (a window, needs OpenCV) or ``None``
    :param options: of the task, as ``envpool.make`` takes them
    :raises ImportError: if EnvPool is not installed
    :raises ValueError: as :class:`~sb3_ppo_ewma.envs.envpool_vec_env.EnvPoolVecEnv` does
    """

    metadata = {"render_modes": ["rgb_array", "human"], "render_fps": 30}  # noqa: RUF012  # as in Gymnasium

    def __init__(self, task_id: str, render_mode: str | None = None, **options: Any) -> None:
        self._envs = EnvPoolVecEnv(task_id, 1, render_mode=render_mode, **options)
        self.observation_space = self._envs.observation_space
        self.action_space = self._envs.action_space
        self.render_mode = render_mode
        self._started: Any = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """
        :param seed: of the pool, which is made anew; ``None``: the running one goes on
        :param options: none: EnvPool's are given when it is made
        :return: first observation, information
        :raises ValueError: if there are options
        """
        super().reset(seed=seed)
        self._envs.set_options(options)
        if seed is not None:
            self._envs.seed(seed)
        # At an episode's end the next has begun already. It counts: in Atari it may be the same game's next life.
        observation = self._started if seed is None and self._started is not None else _first(self._envs.reset())
        self._started = None
        return observation, self._envs.reset_infos[0]

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """
        :param action: of the action space
        :return: observation, reward, whether the episode ended, whether a time limit cut it, information
        :raises RuntimeError: if the episode is over, or none has begun
        """
        if self._started is not None:
            raise RuntimeError("step() after the end of an episode: call reset() first")
        observations, rewards, dones, infos = self._envs.step(np.asarray(action)[None])
        info = infos[0]
        truncated = info.pop("TimeLimit.truncated")
        info.pop("episode", None)  # is Monitor's
        observation = _first(observations)
        if dones[0]:
            self._started, observation = observation, _as_in_gymnasium(info.pop("terminal_observation"))
        return observation, float(rewards[0]), bool(dones[0]) and not truncated, truncated, info

    def render(self) -> Any:
        """
        :return: a picture, (height, width, 3), uint8; ``None`` if it went to a window
        """
        return self._envs.render() if self.render_mode is not None else None

    def close(self) -> None:
        """
        End the pool.
        """
        self._envs.close()


def _first(observations: Any) -> Any:
    """
    :param observations: of one environment, (1, …)
    :return: the first of them
    """
    is_dict = isinstance(observations, dict)
    return _as_in_gymnasium({name: each[0] for name, each in observations.items()} if is_dict else observations[0])


def _as_in_gymnasium(observation: Any) -> Any:
    """
    :param observation: array, number or a dict of these
    :return: the same, with numbers in the type that Gymnasium has for them
    """
    if isinstance(observation, dict):
        return {name: _as_in_gymnasium(each) for name, each in observation.items()}
    return np.int64(observation) if np.ndim(observation) == 0 else observation


class EnvPoolAtariEnv(EnvPoolEnv):
    """
    A game of Atari. rl-zoo3 knows one by this class's name.
    """


def register(task_ids: Iterable[str], env_class: type[EnvPoolEnv] = EnvPoolEnv) -> None:
    """
    Make Gymnasium know tasks of EnvPool under their own names, as far as it has none of these names.

    :param task_ids: names of tasks
    :param env_class: of the environments
    """
    for task_id in task_ids:
        if task_id not in gym.registry:
            gym.register(task_id, entry_point=f"{__name__}:{env_class.__name__}", kwargs={"task_id": task_id})
