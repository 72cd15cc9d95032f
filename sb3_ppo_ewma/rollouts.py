"""Rollouts on their way from collection to training: checks, waiting (artificial staleness), recomputed advantages."""

import copy
import os
import pathlib
import pickle
from collections import deque
from dataclasses import dataclass
from io import BufferedIOBase
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer

_FORMAT_VERSION = 1


@dataclass
class Rollout:
    """
    A collected rollout and what is needed to bootstrap from its end.

    :param buffer: filled rollout buffer
    :param last_obs: observation after the last step, (n_envs, ...) or a dictionary of such arrays
    :param last_dones: whether the last step ended an episode, (n_envs,)
    :param last_lstm_states: hidden and cell state of the critic after the last step (recurrent policies)
    """

    buffer: RolloutBuffer
    last_obs: Any
    last_dones: np.ndarray
    last_lstm_states: Any = None

    def __post_init__(self) -> None:
        # Recurrent buffers flatten these in place when training begins, GAE needs them as (n_steps, n_envs).
        self.episode_starts = self.buffer.episode_starts

    def check_finite(self) -> None:
        """
        :raises ValueError: if the rollout has a NaN or Inf, naming the quantity and where it comes from
        """
        quantities = {
            "observations": (self.buffer.observations, "the environment"),
            "the last observation": (self.last_obs, "the environment"),
            # Before the rewards, to which the values of truncated episodes are added
            "values": (self.buffer.values, "the network"),
            "log-probabilities": (self.buffer.log_probs, "the network"),
            "rewards": (self.buffer.rewards, "the environment"),
            "advantages": (self.buffer.advantages, "rewards or values that overflow"),
        }
        for name, (array, origin) in quantities.items():
            if not is_finite(array):
                raise ValueError(
                    f"NaN or Inf in {name} of the rollout, from {origin}. The parameters are those from before it. "
                    "VecCheckNan finds the step where it begins."
                )

    def detached_copy(self) -> "Rollout":
        """
        :return: a copy that the next collection cannot overwrite
        """
        buffer = copy.copy(self.buffer)
        for name, value in vars(buffer).items():
            if isinstance(value, np.ndarray) or (name == "observations" and isinstance(value, dict)):
                setattr(buffer, name, copy.deepcopy(value))
        return Rollout(buffer, copy.deepcopy(self.last_obs), self.last_dones.copy(), self.last_lstm_states)

    def replace_values(self, values: np.ndarray, last_values: th.Tensor) -> None:
        """
        Compute advantages and returns anew from other values, with the buffer's own GAE. Rewards stay as collected,
        that is, with the bootstrap of truncated episodes by the value function of that time; so do the values that
        value clipping refers to.

        :param values: (n_envs · n_steps,), environment by environment as in the flattened buffer
        :param last_values: (n_envs,) of the observation after the last step
        """
        buffer = self.buffer
        scratch = copy.copy(buffer)
        scratch.values = np.ascontiguousarray(values.reshape(buffer.n_envs, buffer.buffer_size).T)
        scratch.advantages = np.zeros_like(scratch.values)
        scratch.episode_starts = self.episode_starts
        scratch.compute_returns_and_advantage(last_values, self.last_dones)
        buffer.advantages = buffer.swap_and_flatten(scratch.advantages)
        buffer.returns = buffer.swap_and_flatten(scratch.returns)


def is_finite(array: Any) -> bool:
    """
    :param array: array, or dictionary of arrays
    :return: whether no floating-point entry is NaN or Inf
    """
    if isinstance(array, dict):
        return all(is_finite(value) for value in array.values())
    array = np.asarray(array)
    return not np.issubdtype(array.dtype, np.inexact) or bool(np.isfinite(array).all())


def observations_at(buffer: RolloutBuffer, indices: slice) -> Any:
    """
    :param buffer: flattened rollout buffer
    :param indices: of its samples
    :return: their observations as tensors on the buffer's device, a dictionary of them for dictionary observations
    """
    if isinstance(buffer.observations, dict):
        return {key: buffer.to_torch(value[indices]) for key, value in buffer.observations.items()}
    return buffer.to_torch(buffer.observations[indices])


class StaleRollouts:
    """
    First-in, first-out queue that delays training on a rollout by ``staleness`` iterations.

    :param staleness: number of iterations a rollout waits, at least 1
    """

    def __init__(self, staleness: int) -> None:
        self.staleness = staleness
        self.waiting: deque[Rollout] = deque()

    def exchange(self, rollout: Rollout) -> Rollout | None:
        """
        :param rollout: the one just collected, it is copied
        :return: the one to train on now, ``None`` while the queue fills
        """
        self.waiting.append(rollout.detached_copy())
        return self.waiting.popleft() if len(self.waiting) > self.staleness else None

    @property
    def missing(self) -> int:
        """
        :return: rollouts still to be collected before training begins
        """
        return self.staleness - len(self.waiting)

    def save(self, path: str | pathlib.Path | BufferedIOBase, num_timesteps: int) -> None:
        """
        Write the queue, atomically when ``path`` is a file name: a run that is killed leaves the old file whole.

        :param path: file name (``.pkl`` is added where there is no suffix) or open binary file
        :param num_timesteps: the model's, checked by :meth:`load`
        """
        content = {
            "format": _FORMAT_VERSION,
            "num_timesteps": num_timesteps,
            "parts": {"stale_rollouts": list(self.waiting)},
        }
        if isinstance(path, BufferedIOBase):
            pickle.dump(content, path, protocol=pickle.HIGHEST_PROTOCOL)
            return
        path = _with_suffix(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        with temporary.open("wb") as file:
            pickle.dump(content, file, protocol=pickle.HIGHEST_PROTOCOL)
        temporary.replace(path)

    def load(self, path: str | pathlib.Path | BufferedIOBase, model_buffer: RolloutBuffer, num_timesteps: int) -> None:
        """
        :param path: as for :meth:`save`
        :param model_buffer: the model's rollout buffer; the waiting ones must fit it
        :param num_timesteps: the model's
        :raises ValueError: if the file is of another kind, another step or another size of rollouts
        """
        if isinstance(path, BufferedIOBase):
            content = pickle.load(path)
        else:
            with _with_suffix(path).open("rb") as file:
                content = pickle.load(file)
        known = isinstance(content, dict) and content.get("format") == _FORMAT_VERSION
        if not known or "stale_rollouts" not in content["parts"]:
            raise ValueError(f"{path} is not a queue of waiting rollouts (format {_FORMAT_VERSION})")
        if content["num_timesteps"] != num_timesteps:
            raise ValueError(
                f"{path} belongs to num_timesteps={content['num_timesteps']}, the model is at {num_timesteps}: "
                "load the file that was saved together with the model"
            )
        rollouts: list[Rollout] = content["parts"]["stale_rollouts"]
        if len(rollouts) > self.staleness:
            raise ValueError(f"{path} has {len(rollouts)} waiting rollouts, staleness={self.staleness} allows fewer")
        expected = (model_buffer.buffer_size, model_buffer.n_envs)
        for rollout in rollouts:
            size = (rollout.buffer.buffer_size, rollout.buffer.n_envs)
            if size != expected:
                raise ValueError(f"{path} has rollouts of (n_steps, n_envs) = {size}, the model expects {expected}")
            rollout.buffer.device = model_buffer.device
        self.waiting = deque(rollouts)


def _with_suffix(path: str | pathlib.Path) -> pathlib.Path:
    path = pathlib.Path(path)
    return path if path.suffix else path.with_suffix(".pkl")
