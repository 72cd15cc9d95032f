"""A ``SubprocVecEnv`` with several environments in each process."""

import multiprocessing
import multiprocessing.connection
import os
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv
from stable_baselines3.common.vec_env.base_vec_env import CloudpickleWrapper
from stable_baselines3.common.vec_env.patch_gym import _patch_env

from sb3_ppo_ewma._arguments import check_choice, check_integer, naming_misspelled


class GroupedVecEnv(SubprocVecEnv):
    """
    SB3's ``SubprocVecEnv`` for more environments than processes. The environments of a process step one after the
    other.

    .. code-block:: python

        env = make_vec_env("Ant-v5", 32, vec_env_cls=GroupedVecEnv, vec_env_kwargs={"n_processes": 8})

    :param env_fns: functions that make the environments
    :param n_processes: number of processes, among which the environments are divided evenly; ``None``: one for each
        core, but not more than environments
    :param start_method: how processes start, as for ``SubprocVecEnv``
    :raises TypeError: for an unknown argument, or if ``n_processes`` is not an integer
    :raises ValueError: if there are no environments, more processes than environments, or no such start method
    """

    @naming_misspelled
    def __init__(
        self,
        env_fns: list[Callable[[], gym.Env[Any, Any]]],
        n_processes: int | None = None,
        start_method: str | None = None,
    ) -> None:
        n_envs = len(env_fns)
        if n_envs == 0:
            raise ValueError("env_fns must make at least one environment, got []")
        if n_processes is None:
            n_processes = min(os.cpu_count() or 1, n_envs)
        check_integer("n_processes", n_processes, minimum=1)
        if n_processes > n_envs:
            raise ValueError(f"n_processes must be at most the number of environments, {n_envs}, got {n_processes}")
        methods = multiprocessing.get_all_start_methods()
        if start_method is None:
            start_method = "forkserver" if "forkserver" in methods else "spawn"
        check_choice("start_method", start_method, tuple(methods), "None")
        context: Any = multiprocessing.get_context(start_method)
        self.waiting = self.closed = False
        self.remotes, self.work_remotes = zip(*(context.Pipe() for _ in range(n_envs)), strict=True)
        inherited = self.remotes if start_method == "fork" else ()
        self.processes = []  # that of each environment
        for group in np.array_split(np.arange(n_envs), n_processes):
            pipes = [self.work_remotes[index] for index in group]
            makers = CloudpickleWrapper([env_fns[index] for index in group])
            process = context.Process(target=_serve, args=(pipes, inherited, makers), daemon=True)
            process.start()
            self.processes += [process] * len(group)
            for pipe in pipes:
                pipe.close()
        self.remotes[0].send(("get_spaces", None))
        observation_space, action_space = self.remotes[0].recv()
        VecEnv.__init__(self, n_envs, observation_space, action_space)


def _serve(pipes: Sequence[Any], inherited: Sequence[Any], makers: CloudpickleWrapper) -> None:
    """
    Answer what comes through the pipes until all are closed.

    :param pipes: one for each environment
    :param inherited: ends of pipes to close, which belong to the process that started this one
    :param makers: functions that make the environments
    """
    for pipe in inherited:
        pipe.close()
    envs: dict[Any, _Env] = {pipe: _Env(make) for pipe, make in zip(pipes, makers.var, strict=True)}
    try:
        while envs:
            ready: Sequence[Any] = multiprocessing.connection.wait(list(envs))
            for pipe in ready:
                command, data = pipe.recv()
                if command == "close":
                    envs.pop(pipe).env.close()
                    pipe.close()
                else:
                    pipe.send(envs[pipe].answer(command, data))
    except (EOFError, KeyboardInterrupt):  # as in SubprocVecEnv
        return


class _Env:
    """
    An environment that answers the messages of SB3's ``SubprocVecEnv``.

    :param make: makes the environment
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self.env: Any = _patch_env(make())
        self._reset_info: dict[str, Any] = {}

    def answer(self, command: str, data: Any) -> Any:
        return getattr(self, f"_{command}")(data)

    def _step(self, action: Any) -> tuple[Any, ...]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        info["TimeLimit.truncated"] = truncated and not terminated
        if terminated or truncated:
            info["terminal_observation"] = observation
            observation, self._reset_info = self.env.reset()
        return observation, reward, terminated or truncated, info, self._reset_info

    def _reset(self, data: tuple[int | None, dict[str, Any]]) -> tuple[Any, dict[str, Any]]:
        seed, options = data
        observation, self._reset_info = self.env.reset(seed=seed, **({"options": options} if options else {}))
        return observation, self._reset_info

    def _render(self, _: None) -> Any:
        return self.env.render()

    def _get_spaces(self, _: None) -> tuple[Any, Any]:
        return self.env.observation_space, self.env.action_space

    def _env_method(self, data: tuple[str, tuple[Any, ...], dict[str, Any]]) -> Any:
        name, args, kwargs = data
        return self.env.get_wrapper_attr(name)(*args, **kwargs)

    def _get_attr(self, name: str) -> Any:
        return self.env.get_wrapper_attr(name)

    def _has_attr(self, name: str) -> bool:
        try:
            self.env.get_wrapper_attr(name)
        except AttributeError:
            return False
        return True

    def _set_attr(self, data: tuple[str, Any]) -> None:
        setattr(self.env, *data)

    def _is_wrapped(self, wrapper_class: type) -> bool:
        from stable_baselines3.common.env_util import is_wrapped  # imports SB3's vectorised environments

        return is_wrapped(self.env, wrapper_class)
