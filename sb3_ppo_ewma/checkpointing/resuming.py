"""
A rollout that was interrupted goes on. The algorithm's own ``collect_rollouts`` begins again: for the steps that were
made before, what stands in for environments and policy answers at once, and their results are put in place; then the
real ones go on.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn, VecEnvWrapper

# What the loops of SB3 and sb3-contrib call the parts of a step
_ARRAYS = ("new_obs", "rewards", "dones")
_NOISE = ("exploration_mat", "exploration_matrices")


class RolloutInProgress:
    """
    A rollout in the middle of its collection, as plain data.

    :param data: from :func:`rollout_in_progress`
    """

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data
        self.n_steps: int = data["n_steps"]

    def cut(self, observations: Any) -> None:
        """
        The environments begin anew: the episodes end with the last step, as if a time limit had cut them.

        :param observations: first ones of the new episodes
        """
        step = self.data["step"]
        for index, info in enumerate(step["infos"]):
            if not step["dones"][index]:
                info |= {"TimeLimit.truncated": True, "terminal_observation": _row(step["new_obs"], index)}
        step["dones"] = np.ones_like(step["dones"])
        step["new_obs"] = observations

    def collect(
        self, model: Any, collect: Callable[..., bool], env: VecEnv, callback: Any, buffer: Any, *args: Any, **kwargs: Any
    ) -> bool:
        """
        :param model: the algorithm
        :param collect: its ``collect_rollouts``
        :param env: the training environments
        :param callback: called from the next step on
        :param buffer: buffer to fill
        :param args: further positional arguments of ``collect``
        :param kwargs: further keyword arguments of ``collect``
        :return: False when a callback ended the collection
        """
        if self.data["step"] is None:
            self._take_place(model, buffer)
            return True
        self._is_over = False
        model._last_obs = self.data["last_obs"]
        policy = model.policy
        previous = policy._compiled_call_impl
        policy._compiled_call_impl = stand_in = _StandIn(self, previous or policy._call_impl, model.device)
        views = _ReplayedVecEnv(env, self), _ReplayedCallback(callback, env, self)
        try:
            return collect(*views, buffer, *args, **kwargs)
        finally:
            if policy._compiled_call_impl is stand_in:
                policy._compiled_call_impl = previous

    @property
    def is_over(self) -> bool:
        """
        :return: whether the real environments and policy go on
        """
        return self._is_over

    def step_made(self, model: Any, buffer: Any) -> None:
        """
        To be called after each step, before it enters the buffer.

        :param model: the algorithm
        :param buffer: the buffer that it fills
        """
        if not self._is_over and buffer.pos == self.n_steps - 1:
            self._take_place(model, buffer)
            self._is_over = True

    def _take_place(self, model: Any, buffer: Any) -> None:
        data = self.data
        for name, array in data["buffer"].items():
            _copy_into(getattr(buffer, name), array)
        buffer.pos, buffer.full = data["pos"], data["full"]
        buffer.generator_ready = False
        vars(model).update({name: data[name] for name in ("last_obs", "last_episode_starts") if False})
        model._last_obs, model._last_episode_starts = data["last_obs"], data["last_episode_starts"]
        if data["last_lstm_states"] is not None:
            model._last_lstm_states = _lstm_states(model, data["last_lstm_states"])
        model.num_timesteps = data["num_timesteps"]
        distribution = model.policy.action_dist
        for name, array in data["noise"].items():
            setattr(distribution, name, th.as_tensor(array, device=model.device))
        model.generators.load_state_dict({name: th.as_tensor(array) for name, array in data["generators"].items()})
        model.generators.apply_pending()

    # ------------------------------------------------------------------ for what stands in

    def outputs(self, device: Any, with_states: bool, model: Any) -> tuple[Any, ...]:
        """
        :param device: of the policy
        :param with_states: whether the policy has an LSTM
        :param model: its algorithm
        :return: what the policy returned for the last step
        """
        step = self.data["step"]
        return tuple(th.as_tensor(step[name], device=device) for name in ("actions", "values", "log_probs"))

    def step(self, pos: int) -> VecEnvStepReturn:
        return None  # type: ignore[return-value]
