"""A vectorised environment in another process, which can also collect rollouts there."""

import inspect
import multiprocessing
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from stable_baselines3.common.vec_env.base_vec_env import (
    CloudpickleWrapper,
    VecEnvIndices,
    VecEnvObs,
    VecEnvStepReturn,
)

from sb3_ppo_ewma._arguments import check_choice, check_names, naming_misspelled
from sb3_ppo_ewma._parallel.worker import Worker
from sb3_ppo_ewma._parallel.worker_process import WorkerProcess

# Seconds without an answer; an algorithm that collects in the process has its own
_TIMEOUT = 600.0


class RemoteVecEnv(VecEnv):
    """
    Environments in one other process, made there by functions. With ``max_policy_lag``, an algorithm collects its
    rollouts in that process. It needs no ``fork()``, which some systems lack and which other threads can make fail.

    >>> from stable_baselines3.common.env_util import make_vec_env
    >>> from sb3_ppo_ewma import PPOEWMA, RemoteVecEnv
    >>> if __name__ == "__main__":  # the other process imports this file
    ...     env = make_vec_env("CartPole-v1", 8, vec_env_cls=RemoteVecEnv)
    ...     model = PPOEWMA("MlpPolicy", env, n_steps=64, max_policy_lag=1).learn(1024)
    ...     env.close()

    :param env_fns: functions that make one Gymnasium environment each
    :param start_method: ``"forkserver"``, ``"spawn"`` or ``"fork"``; ``None``: the first of them that the system has
    :param vec_env_cls: class of vectorised environments to make in the process
    :param vec_env_kwargs: further arguments of that class
    :raises TypeError: for an unknown argument, also in ``vec_env_kwargs``, or one of the wrong type
    :raises ValueError: for a start method that the system lacks, or without environments
    :raises Exception: what a function raised in the process
    """

    actions: np.ndarray

    @naming_misspelled
    def __init__(
        self,
        env_fns: Sequence[Callable[[], gym.Env[Any, Any]]],
        start_method: str | None = None,
        vec_env_cls: Callable[..., VecEnv] = DummyVecEnv,
        vec_env_kwargs: dict[str, Any] | None = None,
    ) -> None:
        methods = [name for name in ("forkserver", "spawn", "fork") if name in multiprocessing.get_all_start_methods()]
        if start_method is not None:
            check_choice("start_method", start_method, tuple(methods), "None")
        make = CloudpickleWrapper(_checked_call(env_fns, vec_env_cls, vec_env_kwargs or {}))
        # An algorithm with max_policy_lag collects in it.
        self.worker_process = WorkerProcess(start_method or methods[0], _run, (make, _TIMEOUT), _TIMEOUT)
        super().__init__(*self.worker_process.description)

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        # The innermost environments there, whatever an algorithm wraps around them
        return self.worker_process.call(-1, name, *args, **kwargs).value

    def reset(self) -> VecEnvObs:
        """
        :return: first observations, (num_envs, ...)
        """
        observations: VecEnvObs = self._call("reset")
        self.reset_infos = self._call("__getattribute__", "reset_infos")
        self._reset_seeds()
        self._reset_options()
        return observations

    def step_async(self, actions: np.ndarray) -> None:
        """
        :param actions: (num_envs, ...)
        """
        self.actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """
        :return: observations, rewards, ends of episodes, information
        """
        result: VecEnvStepReturn = self._call("step", self.actions)
        return result

    def close(self) -> None:
        """
        Close the environments and end the process.

        :raises Exception: what closing them has raised
        """
        self.worker_process.end()
        self.worker_process.raise_last()

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """
        :param seed: seed of the first environment at the next reset
        :return: the seeds of all
        """
        self._seeds = list(self._call("seed", seed))
        return self._seeds

    def set_options(self, options: list[dict[str, Any]] | dict[str, Any] | None = None) -> None:
        """
        :param options: of the environments at the next reset
        """
        super().set_options(options)
        self._call("set_options", options)

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """
        :param attr_name: name of an attribute
        :param indices: of environments
        :return: its values
        """
        result: list[Any] = self._call("get_attr", attr_name, indices)
        return result

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """
        :param attr_name: name of an attribute
        :param value: its new value
        :param indices: of environments
        """
        self._call("set_attr", attr_name, value, indices)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **kwargs: Any
    ) -> list[Any]:
        """
        :param method_name: name of a method
        :param method_args: its positional arguments
        :param indices: of environments
        :param kwargs: its keyword arguments
        :return: its results
        """
        result: list[Any] = self._call("env_method", method_name, *method_args, indices=indices, **kwargs)
        return result

    def env_is_wrapped(
        self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: VecEnvIndices = None
    ) -> list[bool]:
        """
        :param wrapper_class: class of wrappers
        :param indices: of environments
        :return: whether they have such a wrapper
        """
        result: list[bool] = self._call("env_is_wrapped", wrapper_class, indices)
        return result

    def get_images(self) -> Sequence[np.ndarray | None]:
        """
        :return: an image of each environment
        """
        result: Sequence[np.ndarray | None] = self._call("get_images")
        return result


def _checked_call(env_fns: Any, vec_env_cls: Any, vec_env_kwargs: dict[str, Any]) -> Callable[[], VecEnv]:
    env_fns = list(env_fns)
    if not env_fns:
        raise ValueError("env_fns must make at least one environment, got []")
    for each in env_fns:
        if not callable(each):
            raise TypeError(f"env_fns must be functions that make environments, got {each!r}")
    if not callable(vec_env_cls):
        raise TypeError(f"vec_env_cls must be a class of vectorised environments, got {vec_env_cls!r}")
    parameters = inspect.signature(vec_env_cls).parameters
    if not any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        check_names(getattr(vec_env_cls, "__name__", "vec_env_cls"), [*vec_env_kwargs], [*parameters])
    return partial(vec_env_cls, env_fns, **vec_env_kwargs)


def _run(
    connection: "Connection[Any, Any]", parent_connection: "Connection[Any, Any] | None", make: Any, timeout: float
) -> None:
    Worker(connection, make.var, timeout).run(parent_connection)
