"""Lets a checkpoint have the state of environments in processes of their own."""

import random
from typing import Any

import gymnasium as gym
import numpy as np

from sb3_ppo_ewma.checkpointing.object_states import restore_state, state_of
from sb3_ppo_ewma.checkpointing.plain_data import dumps, loads
from sb3_ppo_ewma.checkpointing.simulator_states import UnknownStateError


class EnvStateWrapper(gym.Wrapper[Any, Any, Any, Any]):
    """
    Lets :meth:`~sb3_ppo_ewma.EwmaMixin.save_checkpoint` ask an environment of a ``SubprocVecEnv`` for its state, with
    that of the generators of random numbers in its process. Environments of a ``DummyVecEnv`` do not need it.

    .. code-block:: python

        env = make_vec_env("Ant-v5", n_envs=8, vec_env_cls=SubprocVecEnv, wrapper_class=EnvStateWrapper)

    :param env: environment; everything it holds must be Python objects, arrays, MuJoCo's or ALE's data, or it has
        methods ``get_state()`` and ``set_state(state)`` of its own
    """

    def checkpoint_state(self) -> tuple[bytes | None, str]:
        """
        :return: the state, ``None`` if it cannot be read; then why
        """
        process = [np.random.get_state(legacy=False), random.getstate()]
        try:
            return dumps([state_of(self.env), process]), ""
        except UnknownStateError as error:
            return None, str(error)

    def restore_checkpoint_state(self, data: bytes) -> str:
        """
        :param data: from :meth:`checkpoint_state`
        :return: why the state cannot be restored; empty if it has been
        """
        state, (numpys, pythons) = loads(data)
        try:
            restore_state(self.env, state)
        except UnknownStateError as error:
            return str(error)
        np.random.set_state(numpys)
        random.setstate(pythons)
        return ""
