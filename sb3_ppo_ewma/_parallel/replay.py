"""Callbacks of a rollout that another process has collected."""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_ewma._parallel.worker import CollectedRollout
from sb3_ppo_ewma.rollouts import LSTM_STATES


def replay_steps(model: Any, env: VecEnv, callback: BaseCallback, buffer: Any, rollout: CollectedRollout) -> bool:
    """
    Call callbacks for every step of a rollout, with the local variables of SB3's loop. What they change in place has
    the effect that it has in SB3.

    :param model: the algorithm
    :param env: the training environments
    :param callback: called for every step
    :param buffer: rollout buffer with the rollout
    :param rollout: the rollout
    :return: False when the callback ended the collection
    :raises ValueError: if the callback changed what later steps would have depended on
    """
    venv = model.get_vec_normalize_env()
    changes = _Changes(buffer, rollout)
    own = {"self": model, "env": env, "callback": callback, "rollout_buffer": buffer}
    callback.update_locals({**own, "n_rollout_steps": buffer.buffer_size})
    for step, variables in enumerate(_local_variables(model, buffer, rollout)):
        model._last_obs = variables.pop("last_obs")
        model._last_episode_starts = buffer.episode_starts[step].astype(bool)
        if venv is not None and rollout.original_rewards is not None:
            venv.old_reward = rollout.original_rewards[step]
        model.num_timesteps += env.num_envs
        buffer.pos, buffer.full = step, False
        callback.update_locals(variables)
        if not callback.on_step():
            return False
        model._update_info_buffer(variables["infos"], variables["dones"])
    buffer.pos, buffer.full = buffer.buffer_size, True
    changes.apply()
    return True


def _local_variables(model: Any, buffer: Any, rollout: CollectedRollout) -> Iterator[dict[str, Any]]:
    """
    :param model: the algorithm
    :param buffer: rollout buffer with the rollout
    :param rollout: the rollout
    :return: for each step, the local variables of SB3's loop when it calls the callbacks, and "last_obs"
    """
    n_steps, state = buffer.buffer_size, rollout.state
    observations = _as_returned(buffer.observations, model.observation_space)
    if isinstance(observations, dict):
        observations = type(state["_last_obs"])(observations)
    obs_tensors = obs_as_tensor(observations, th.device("cpu"))
    values, log_probs = th.as_tensor(buffer.values[..., None]), th.as_tensor(buffer.log_probs)
    is_recurrent = hasattr(buffer, LSTM_STATES[0])
    episode_starts = th.as_tensor(buffer.episode_starts, dtype=th.float32)
    for step in range(n_steps):
        variables: dict[str, Any] = {
            **{name: rows[step] for name, rows in rollout.recorded.items()},
            "last_obs": _row(observations, step),
            "n_steps": step,
            "obs_tensor": _row(obs_tensors, step),
            "values": values[step],
            "log_probs": log_probs[step],
            "new_obs": state["_last_obs"] if step + 1 == n_steps else _row(observations, step + 1),
            "infos": rollout.infos[step],
        }
        if is_recurrent:
            variables["episode_starts"] = episode_starts[step]
            variables["lstm_states"] = _states_after(buffer, step, state["_last_lstm_states"])
        yield variables


def _states_after(buffer: Any, step: int, last: Any) -> Any:
    """
    :param buffer: recurrent rollout buffer
    :param step: number of a step
    :param last: states after the last one
    :return: the LSTM's states after the step
    """
    if step + 1 == buffer.buffer_size:
        return last
    hidden_pi, cell_pi, hidden_vf, cell_vf = (th.as_tensor(getattr(buffer, name)[step + 1]) for name in LSTM_STATES)
    return type(last)((hidden_pi, cell_pi), (hidden_vf, cell_vf))


class _Changes:
    """
    What callbacks change of a rollout.

    :param buffer: rollout buffer, before the callbacks
    :param rollout: the rollout
    """

    def __init__(self, buffer: Any, rollout: CollectedRollout) -> None:
        self._buffer, self._rollout = buffer, rollout
        self._recorded = {name: rollout.recorded[name].copy() for name in ("rewards", "dones")}
        self._arrays = {name: getattr(buffer, name).copy() for name in ("rewards", "values", "episode_starts")}
        self._bootstrapped = copy.deepcopy(self._terminal_observations())

    def apply(self) -> None:
        """
        Let changes act on the rollout buffer.

        :raises ValueError: if what was changed would have changed the collection itself
        """
        buffer, recorded = self._buffer, self._rollout.recorded
        actions = recorded["actions"].reshape(buffer.actions.shape)
        if not np.array_equal(actions, buffer.actions, equal_nan=actions.dtype.kind == "f"):
            buffer.actions[...] = actions
        self._check_terminal_observations()
        if self._has_changed(recorded, self._recorded, "dones"):
            self._apply_dones()
        if self._has_changed(recorded, self._recorded, "rewards"):
            added = self._arrays["rewards"] - self._recorded["rewards"].astype(np.float32)  # to truncated episodes
            buffer.rewards[...] = recorded["rewards"].astype(np.float32) + np.where(recorded["dones"], added, 0)
        if any(self._has_changed(vars(buffer), self._arrays, name) for name in self._arrays):
            self._recompute_advantages()

    @staticmethod
    def _has_changed(now: Any, before: dict[str, np.ndarray], name: str) -> bool:
        return not np.array_equal(now[name], before[name], equal_nan=now[name].dtype.kind == "f")

    def _terminal_observations(self) -> dict[tuple[int, int], Any]:
        """
        :return: by step and environment, the observations whose values SB3 adds to rewards
        """
        found = {}
        for step, index in np.argwhere(self._rollout.recorded["dones"]):
            info = self._rollout.infos[step][index]
            if info.get("terminal_observation") is not None and info.get("TimeLimit.truncated", False):
                found[int(step), int(index)] = info["terminal_observation"]
        return found

    def _check_terminal_observations(self) -> None:
        dones, before, now = self._rollout.recorded["dones"], self._bootstrapped, self._terminal_observations()
        before = {place: each for place, each in before.items() if dones[place]}
        if before.keys() != now.keys() or not all(_are_equal(each, now[place]) for place, each in before.items()):
            raise ValueError(
                "a callback has changed 'TimeLimit.truncated' or 'terminal_observation' in locals['infos']: the value "
                "of that observation goes into the reward, and only the process that collects (max_policy_lag) has "
                "the policy for it; use max_policy_lag=None"
            )

    def _apply_dones(self) -> None:
        buffer, rollout = self._buffer, self._rollout
        if hasattr(buffer, LSTM_STATES[0]):
            raise ValueError(
                "a callback has changed locals['dones']: the LSTM would have begun again, which collection in another "
                "process (max_policy_lag) cannot do any more; use max_policy_lag=None"
            )
        dones = rollout.recorded["dones"]
        buffer.episode_starts[1:] = dones[:-1]
        rollout.state["_last_episode_starts"] = rollout.ending["dones"] = dones[-1]
        ended = self._recorded["dones"] & ~dones
        buffer.rewards[ended] = rollout.recorded["rewards"].astype(np.float32)[ended]

    def _recompute_advantages(self) -> None:
        ending = self._rollout.ending
        if not ending:
            raise ValueError(
                "a callback has changed rewards, values or ends of episodes, but the algorithm's collect_rollouts() "
                "does not compute advantages as SB3's does, so collection in another process (max_policy_lag) cannot "
                "do it again; use max_policy_lag=None"
            )
        self._buffer.compute_returns_and_advantage(**ending)


def _are_equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_are_equal(a[name], b[name]) for name in a)
    return bool(np.array_equal(a, b))


def _as_returned(observations: Any, space: spaces.Space[Any]) -> Any:
    """
    :param observations: observations of a rollout buffer, in which a discrete one is an array with one entry
    :param space: observation space
    :return: (n_steps, n_envs, ...) the observations as the environments returned them
    """
    if isinstance(space, spaces.Dict):
        return {name: _as_returned(observations[name], each) for name, each in space.spaces.items()}
    return observations.reshape(observations.shape[:2]) if isinstance(space, spaces.Discrete) else observations


def _row(observations: Any, step: int) -> Any:
    """
    :param observations: (n_steps, ...) arrays or tensors
    :param step: number of a step
    :return: those of the step; of arrays read-only, because the policy has acted on them as they are
    """
    if isinstance(observations, dict):
        return type(observations)((name, _row(each, step)) for name, each in observations.items())
    row = observations[step]
    if isinstance(row, np.ndarray):
        row.flags.writeable = False
    return row
