"""
A vectorised environment of Stable-Baselines3 that EnvPool (https://envpool.readthedocs.io) steps in C++ threads.
"""

import contextlib
import difflib
import importlib
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, cast

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from stable_baselines3.common.monitor import Monitor, ResultsWriter
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from sb3_ppo_ewma._arguments import check_choice, check_integer

# Options of EnvPool that users cannot pass, with what to do instead
_RESERVED_OPTIONS = {
    "num_envs": "use num_envs",
    "seed": "use seed",
    "env_seed": "use seed",
    "render_mode": "use render_mode",
    "batch_size": "all environments are stepped together",
    "gym_reset_return_info": "EnvPool has no other choice",
}
_RENDER_MODES = ("rgb_array", "human")
# EnvPool's specifications do not list these options.
_RENDER_OPTIONS = ("from_pixels", "render_width", "render_height", "render_camera_id")
# EnvPool's seeds are int32.
_N_SEEDS = 2**31


def import_envpool() -> Any:
    """
    :return: the module ``envpool``
    :raises ImportError: if it is not installed; the message says what to install
    """
    try:
        return importlib.import_module("envpool")
    except ModuleNotFoundError as error:
        if error.name != "envpool":
            raise
        raise ImportError("EnvPoolVecEnv needs EnvPool: pip install 'sb3-ppo-ewma[envpool]'") from error


# Pools of the parent process after a fork, kept because their destructors would wait for threads that do not exist here
_inherited_pools: list[Any] = []


def make_envpool_vec_env(task_id: str, n_envs: int = 1, seed: int | None = None, **kwargs: Any) -> "EnvPoolVecEnv":
    """
    Make a vectorised environment, as :func:`stable_baselines3.common.env_util.make_vec_env` does.

    :param task_id: EnvPool's name of the task
    :param n_envs: number of environments
    :param seed: seed of the first environment, increased by 1 for each further one; ``None``: a random seed
    :param kwargs: other arguments of :class:`EnvPoolVecEnv`, including options of the task
    :return: the vectorised environment
    """
    return EnvPoolVecEnv(task_id, n_envs, seed, **kwargs)


class EnvPoolVecEnv(VecEnv):
    """
    A pool of EnvPool that behaves as Stable-Baselines3 expects:

    - The end of an episode resets its environment in the same step, with the last observation in
      ``infos[i]["terminal_observation"]``. (EnvPool itself resets in the next step and ignores that step's action.)
    - ``infos[i]["TimeLimit.truncated"]``, ``infos[i]["episode"]`` and ``monitor.csv`` follow SB3's ``Monitor``, with
      one file for all environments. In Atari games with ``episodic_life`` or ``reward_clip``, an episode is a whole
      game with its unclipped return, as in SB3; its length counts the agent's steps.
    - ``infos[i]`` has EnvPool's information about the environment, including ``elapsed_step``.
    - The first ``reset()``, and one after ``seed()``, make a new pool, since EnvPool cannot change seeds.

    Single environments are not Python objects: ``env_method()`` supports ``render`` and ``get_wrapper_attr``,
    ``get_attr()`` the standard attributes of a Gymnasium environment, and ``set_attr()`` raises an error.

    :param task_id: EnvPool's name of the task, one of ``envpool.list_all_envs()``
    :param num_envs: number of environments
    :param seed: seed of the first environment, increased by 1 for each further one; ``None``: a random seed
    :param render_mode: ``"rgb_array"``, ``"human"`` (a window with all environments, needs OpenCV) or ``None``
    :param start_index: index of the first environment if there are several pools; added to the seed and used as the
        name of the monitor file
    :param monitor_dir: folder for ``0.monitor.csv``, created if missing; ``None``: no file
    :param info_keywords: keys of ``infos[i]`` to copy to ``infos[i]["episode"]`` and the file
    :param options: options of the task, as ``envpool.make`` takes them: ``num_threads``, ``max_episode_steps``, …
    :raises ImportError: if EnvPool is not installed
    :raises ValueError: if EnvPool has no such task, the task no such option, or SB3 no such spaces
    """

    actions: np.ndarray

    def __init__(
        self,
        task_id: str,
        num_envs: int = 1,
        seed: int | None = None,
        *,
        render_mode: str | None = None,
        start_index: int = 0,
        monitor_dir: str | None = None,
        info_keywords: Sequence[str] = (),
        **options: Any,
    ) -> None:
        envpool = import_envpool()
        check_integer("num_envs", num_envs, minimum=1)
        check_integer("start_index", start_index, minimum=0)
        if render_mode is not None:
            check_choice("render_mode", render_mode, _RENDER_MODES, "None")
        check_task(task_id, envpool.list_all_envs())
        self.task_id = task_id
        self._pool: Any = None
        self._pool_process = 0
        self._is_stepping = False
        self._pool_options = {"num_envs": num_envs, **options}
        pool_spec = _make_spec(envpool, task_id, options, num_envs)
        if getattr(pool_spec.config, "max_num_players", 1) > 1:
            raise ValueError(f"{task_id} has several players, which SB3 does not support")
        self.spec = EnvSpec(
            task_id,
            max_episode_steps=getattr(pool_spec.config, "max_episode_steps", 0) or None,
            reward_threshold=getattr(pool_spec.config, "reward_threshold", None),
        )
        # SB3 opens the window itself and needs images.
        self._opens_window = render_mode == "human"
        self.render_mode = None if render_mode is None else "rgb_array"
        with _without_precision_warnings():
            observation_space = _checked_observation_space(task_id, pool_spec.observation_space)
            action_space = _gymnasium_action_space(task_id, pool_spec.action_space)
        # With clipped rewards and episodes that end with a life, statistics still refer to the whole game.
        state = pool_spec.state_array_spec
        self._reports_games = "info:terminated" in state and "info:reward" in state and "info:lives" in state
        super().__init__(num_envs, observation_space, action_space)
        self.seed(None if seed is None else seed + start_index)
        self._start = time.time()
        self._info_keywords = tuple(info_keywords)
        self._writer: ResultsWriter | None = None
        if monitor_dir is not None:
            header: dict[str, Any] = {"t_start": self._start, "env_id": task_id}
            self._writer = ResultsWriter(os.path.join(monitor_dir, str(start_index)), header, self._info_keywords)
        self._returns = np.zeros(num_envs)
        self._lengths = np.zeros(num_envs, dtype=np.int64)

    # Life cycle ------------------------------------------------------------------------------------------------------

    def seed(self, seed: int | None = None) -> list[int | None]:
        """
        Set the seeds for the next ``reset()``, which makes a new pool.

        :param seed: seed of the first environment; ``None``: drawn from NumPy's global generator, as in SB3
        :return: seeds of all environments, reduced to EnvPool's range of 0 to 2³¹ − 1
        """
        super().seed(seed)
        self._seeds = [None if each is None else each % _N_SEEDS for each in self._seeds]
        return self._seeds

    def set_options(self, options: list[dict[str, Any]] | dict[str, Any] | None = None) -> None:
        """
        :param options: must be empty or ``None``; pass EnvPool's options to the constructor
        :raises ValueError: if there are any
        """
        if any(options if isinstance(options, list) else [options]):
            raise ValueError(f"EnvPool takes no options at a reset, got {options!r}: pass them to EnvPoolVecEnv")

    def reset(self) -> VecEnvObs:
        """
        Start new episodes.

        :return: first observations, (num_envs, …)
        """
        self._drop_inherited_pool()
        if self._is_stepping:
            self._receive()
        if self._pool is None or self._seeds[0] is not None:
            self._make_pool()
        observations, info = self._pool.reset()
        self._reset_seeds()
        self.reset_infos = self._split_infos(info)
        self._returns[:] = 0
        self._lengths[:] = 0
        return cast(VecEnvObs, observations)

    def _make_pool(self) -> None:
        """Make a pool with the seeds set by ``seed()``, or random ones."""
        if self._seeds[0] is None:
            self.seed()
        self._close_pool()
        rendered = {} if self.render_mode is None else {"render_mode": self.render_mode}
        self._pool_process = os.getpid()
        with _without_precision_warnings():
            self._pool = import_envpool().make_gymnasium(
                self.task_id, seed=list(self._seeds), **rendered, **self._pool_options
            )
            # EnvPool caches the space here; built later, it would warn about its bounds.
            _ = self._pool.observation_space

    def close(self) -> None:
        """
        Stop the pool's threads and close the monitor file. May be called twice; ``reset()`` makes a new pool.
        """
        self._close_pool()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    @property
    def is_lost_by_fork(self) -> bool:
        """
        :return: whether a process forked from this one must call ``reset()`` first, since a fork does not copy the
            pool's threads
        """
        return self._pool is not None

    def _drop_inherited_pool(self) -> None:
        if self._pool is not None and self._pool_process != os.getpid():
            _inherited_pools.append(self._pool)
            self._pool, self._is_stepping = None, False

    def _close_pool(self) -> None:
        self._drop_inherited_pool()
        if self._pool is not None:
            if self._is_stepping:
                self._receive()
            self._pool.close()
            self._pool = None  # the destructor ends its threads

    # Steps -----------------------------------------------------------------------------------------------------------

    def step_async(self, actions: np.ndarray) -> None:
        """
        Start a step of all environments in the pool's threads.

        :param actions: (num_envs, …)
        :raises RuntimeError: before the first ``reset()``, and if a step has already started
        :raises ValueError: if the shape of the actions or, for discrete ones, a value is not in the action space
        """
        self._drop_inherited_pool()
        if self._pool is None:
            raise RuntimeError("step() before the first reset()")
        if self._is_stepping:
            raise RuntimeError("step_async() was called again before step_wait()")
        self.actions = self._checked_actions(np.asarray(actions))
        self._pool.send(self.actions)
        self._is_stepping = True

    def step_wait(self) -> VecEnvStepReturn:
        """
        Wait for the step, and reset the environments whose episodes ended.

        :return: observations (num_envs, …), rewards (num_envs,), dones (num_envs,), infos
        :raises RuntimeError: if no step has started
        """
        if not self._is_stepping:
            raise RuntimeError("step_wait() was called before step_async()")
        observations, rewards, terminated, truncated, info = self._receive()
        ended_by_pool = terminated | truncated
        truncated = self._truncated(rewards, ended_by_pool, truncated & ~terminated, info)
        dones = ended_by_pool | truncated
        infos = self._split_infos({**info, "TimeLimit.truncated": truncated})
        self._returns += info["reward"] if self._reports_games else rewards
        self._lengths += 1
        if dones.any():
            ended = np.flatnonzero(dones)
            over = info["terminated"].astype(bool) | truncated if self._reports_games else dones
            for index in ended.tolist():
                infos[index]["terminal_observation"] = _row(observations, index)
                if over[index]:
                    self._record_episode(index, infos[index])
            self._begin_episodes(observations, np.flatnonzero(ended_by_pool), np.flatnonzero(dones & ~ended_by_pool))
        return observations, rewards.astype(np.float32, copy=False), dones, infos

    def _truncated(
        self, rewards: np.ndarray, ended: np.ndarray, truncated: np.ndarray, info: dict[str, Any]
    ) -> np.ndarray:
        """
        EnvPool counts every end at or after ``max_episode_steps`` as a truncation, also in families that do not end
        episodes there, and the end of an Atari game.

        :param rewards: (num_envs,)
        :param ended: whether EnvPool ended the episode, (num_envs,)
        :param truncated: whether EnvPool says that the limit ended it, (num_envs,)
        :param info: arrays by name, (num_envs, …)
        :return: whether the limit ends the episode, (num_envs,)
        """
        if self._reports_games:
            truncated = truncated & ~info["terminated"].astype(bool)
        limit = self.spec.max_episode_steps
        if limit is None:  # BabyAI: every level has its own, unknown here. Whatever is rewarded has reached its goal.
            return truncated & (rewards <= 0)
        elapsed_steps: np.ndarray = info["elapsed_step"]
        return truncated | (~ended & (elapsed_steps >= limit))

    def _begin_episodes(self, observations: Any, ended: np.ndarray, cut: np.ndarray) -> None:
        """
        :param observations: (num_envs, …), changed in place
        :param ended: indices of the environments whose episodes EnvPool ended
        :param cut: indices of the environments whose episodes EnvPool would continue
        """
        begun = []
        if ended.size:
            # A step after the end of an episode only resets the environment and ignores the action. EnvPool's reset()
            # would instead end an Atari game that continues after a lost life.
            first, _, _, _, info = self._pool.step(self.actions[ended], ended)
            begun.append((ended, first, info))
        if cut.size:
            begun.append((cut, *self._pool.reset(cut)))
        for indices, first, info in begun:
            _set_rows(observations, indices, first)
            for index, each in zip(indices.tolist(), self._split_infos(info), strict=True):
                self.reset_infos[index] = each

    def _receive(self) -> Any:
        self._is_stepping = False
        return self._pool.recv(reset=False, return_info=True)

    def _checked_actions(self, actions: np.ndarray) -> np.ndarray:
        """
        Refuse actions that would make EnvPool's C++ code read out of bounds.

        :param actions: actions of all environments, (num_envs, …)
        :return: the actions, unchanged
        :raises ValueError: if a shape or a discrete value is not in the action space
        """
        expected = (self.num_envs, *(self.action_space.shape or ()))
        if actions.shape != expected:
            raise ValueError(f"actions must have shape {expected}, got {actions.shape}")
        space = self.action_space
        if isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)):
            first = space.start
            end = first + (space.n if isinstance(space, spaces.Discrete) else space.nvec)
            if (actions < first).any() or (actions >= end).any():
                raise ValueError(f"actions must lie in {space}, got {actions}")
        return actions

    def _split_infos(self, info: dict[str, Any]) -> list[dict[str, Any]]:
        """
        :param info: arrays by name, (environments, …)
        :return: one dict per environment
        """
        arrays = {name: value for name, value in info.items() if name not in ("env_id", "players")}
        rows = zip(*(value.tolist() if value.ndim == 1 else value for value in arrays.values()), strict=True)
        return [dict(zip(arrays, row, strict=True)) for row in rows]

    def _record_episode(self, index: int, info: dict[str, Any]) -> None:
        """
        :param index: index of an environment whose episode ended
        :param info: information of its last step; the statistics are added to it
        """
        episode = {
            "r": round(float(self._returns[index]), 6),
            "l": int(self._lengths[index]),
            "t": round(time.time() - self._start, 6),
        }
        episode.update((name, info[name]) for name in self._info_keywords)
        info["episode"] = episode
        if self._writer is not None:
            self._writer.write_row(episode)
        self._returns[index] = 0
        self._lengths[index] = 0

    # Single environments ---------------------------------------------------------------------------------------------

    def render(self, mode: str | None = None) -> np.ndarray | None:
        """
        :param mode: ``"rgb_array"`` or ``"human"``; ``None``: ``render_mode``
        :return: one image of all environments, (height, width, 3), uint8; ``None`` if it is shown in a window
        """
        return super().render(mode or ("human" if self._opens_window else None))

    def get_images(self) -> Sequence[np.ndarray | None]:
        """
        :return: an image of every environment, (height, width, 3), uint8
        """
        return self._render_each(None)

    def _render_each(self, indices: VecEnvIndices) -> list[np.ndarray | None]:
        chosen = np.asarray(list(self._get_indices(indices)), dtype=np.int32)
        if self.render_mode is None:
            warnings.warn("Nothing is rendered without render_mode='rgb_array'", stacklevel=3)
            return [None for _ in chosen]
        if self._pool is None:
            raise RuntimeError("render() before the first reset()")
        return list(self._pool.render(chosen))

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """
        :param attr_name: ``spec``, ``render_mode``, ``metadata``, ``observation_space`` or ``action_space``
        :param indices: indices of environments; ``None``: all
        :return: the attribute, once per environment
        :raises AttributeError: for any other name
        """
        known: dict[str, Any] = {
            "spec": self.spec,
            "render_mode": self.render_mode,
            "metadata": {"render_modes": list(_RENDER_MODES)},
        }
        if attr_name in ("observation_space", "action_space"):
            known[attr_name] = getattr(self, attr_name)
        if attr_name not in known:
            raise AttributeError(
                f"EnvPool's environments are not Python objects and have no attribute {attr_name!r}, only "
                f"{', '.join([*known, 'observation_space', 'action_space'])}"
            )
        return [known[attr_name] for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """
        Refuse to set an attribute.

        :param attr_name: name of the attribute
        :param value: not used
        :param indices: not used
        :raises AttributeError: always
        """
        raise AttributeError(
            f"EnvPool's environments are not Python objects: {attr_name!r} cannot be set. Pass options to EnvPoolVecEnv"
        )

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """
        :param method_name: ``render`` or ``get_wrapper_attr``
        :param method_args: positional arguments of the method
        :param indices: indices of environments; ``None``: all
        :param method_kwargs: keyword arguments of the method
        :return: the method's result for each environment
        :raises AttributeError: for any other method
        """
        if method_name == "get_wrapper_attr":
            (name,) = (*method_args, *method_kwargs.values())
            return self.get_attr(name, indices)
        if method_name != "render":
            raise AttributeError(
                f"EnvPool's environments are not Python objects and have no method {method_name!r}, only render"
            )
        return self._render_each(indices)

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        """
        :param wrapper_class: wrapper of Gymnasium or SB3
        :param indices: indices of environments; ``None``: all
        :return: ``True`` for ``Monitor``, whose statistics this class records itself, once per environment
        """
        return [wrapper_class is Monitor for _ in self._get_indices(indices)]


def check_task(task_id: str, known: Sequence[str]) -> None:
    """
    :param task_id: name of a task
    :param known: names of all tasks
    :raises ValueError: if there is no such task; the message names similar ones
    """
    if task_id not in known:
        by_lower = {name.lower(): name for name in known}
        near = difflib.get_close_matches(str(task_id).lower(), by_lower, n=5, cutoff=0.5)
        hint = f". Similar: {', '.join(by_lower[name] for name in near)}" if near else ""
        raise ValueError(f"EnvPool has no task {task_id!r}{hint}. envpool.list_all_envs() lists all")


def _make_spec(envpool: Any, task_id: str, options: dict[str, Any], num_envs: int) -> Any:
    """
    :param envpool: the module ``envpool``
    :param task_id: name of the task
    :param options: options of the task
    :param num_envs: number of environments
    :return: EnvPool's specification
    :raises ValueError: if the task has no such option
    """
    for name in options:
        if name in _RESERVED_OPTIONS:
            raise ValueError(f"{name} is not an option here: {_RESERVED_OPTIONS[name]}")
    known = {*envpool.make_spec(task_id).config._fields, *_RENDER_OPTIONS}
    if "max_episode_steps" in options:
        check_integer("max_episode_steps", options["max_episode_steps"], minimum=1)
    unknown = [name for name in options if name not in known]
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f". Did you mean {near[0]!r}?" if near else "."
        allowed = ", ".join(sorted(known - _RESERVED_OPTIONS.keys()))
        raise ValueError(f"{task_id} has no option {unknown[0]!r}{hint} It has {allowed}")
    return envpool.make_spec(task_id, num_envs=num_envs, **options)


def _checked_observation_space(task_id: str, space: Any) -> spaces.Space[Any]:
    """
    :param task_id: name of the task
    :param space: EnvPool's observation space
    :return: the space, unchanged
    :raises ValueError: if SB3 does not support the space
    """
    parts = space.spaces.values() if isinstance(space, spaces.Dict) else [space]
    supported = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
    if not all(isinstance(part, supported) for part in parts):
        raise ValueError(f"Observations of {task_id} are {space}: SB3 supports no tuples and no dicts within dicts")
    return cast("spaces.Space[Any]", space)


def _gymnasium_action_space(task_id: str, space: Any) -> spaces.Space[Any]:
    """
    :param task_id: name of the task
    :param space: EnvPool's action space
    :return: Gymnasium's space for the same task, so that a model works with both: float32 instead of float64, and
        ``MultiDiscrete`` instead of an integer ``Box``
    :raises ValueError: if SB3 does not support the space
    """
    if isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating):
        with np.errstate(over="ignore"):
            return spaces.Box(space.low.astype(np.float32), space.high.astype(np.float32), dtype=np.float32)
    if isinstance(space, spaces.Box) and len(space.shape) == 1 and not space.low.any():
        return spaces.MultiDiscrete(space.high.astype(np.int64) + 1)
    if not isinstance(space, (spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)):
        raise ValueError(f"Actions of {task_id} are {space}: SB3 supports neither dicts nor tuples of actions")
    return cast("spaces.Space[Any]", space)


@contextlib.contextmanager
def _without_precision_warnings() -> Iterator[None]:
    """Suppress Gymnasium's warning that EnvPool's float64 bounds of a space become float32."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*precision lowered by casting.*")
        yield


def _row(observations: Any, index: int) -> Any:
    """
    :param observations: array or dict of arrays, (num_envs, …)
    :param index: index of an environment
    :return: a copy of that environment's observation, (…)
    """
    if isinstance(observations, dict):
        return {name: values[index].copy() for name, values in observations.items()}
    return observations[index].copy()


def _set_rows(observations: Any, indices: np.ndarray, rows: Any) -> None:
    """
    :param observations: array or dict of arrays, (num_envs, …), changed in place
    :param indices: indices of environments, (n,)
    :param rows: new observations of these environments, (n, …)
    """
    if isinstance(observations, dict):
        for name, values in observations.items():
            values[indices] = rows[name]
    else:
        observations[indices] = rows
