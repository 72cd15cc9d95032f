"""
A rollout that was interrupted goes on. The algorithm's own ``collect_rollouts`` begins again. For the steps that were
made before, stand-ins for environments, policy and callback answer at once; then the rollout so far is put in place,
and the real ones go on.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn, VecEnvWrapper

# Local variables of SB3's and sb3-contrib's loops: those that the policy returned, those of the environments
_OUTPUTS, _STEP = ("actions", "values", "log_probs"), ("new_obs", "rewards", "dones", "infos")
# Attributes of gSDE's distribution
_NOISE = ("exploration_mat", "exploration_matrices")


class Collection:
    """
    What is known of a rollout while it is collected.

    :param model: the algorithm
    :param callback: its callback
    :param buffer: buffer to fill
    """

    def __init__(self, model: Any, callback: Any, buffer: Any) -> None:
        self._model, self._callback, self.buffer = model, callback, buffer
        self._start = model.num_timesteps

    @property
    def has_begun(self) -> bool:
        """
        :return: whether a step has been made
        """
        return bool(self._model.num_timesteps != self._start)

    def in_progress(self, variables: dict[str, Any] | None) -> dict[str, Any] | None:
        """
        :param variables: local variables of the loop, ``None``: those that callbacks have
        :return: the rollout so far as plain data, ``None`` if it has not begun
        """
        model, buffer = self._model, self.buffer
        if not self.has_begun:
            return None
        step = None
        if not buffer.full:
            variables = self._callback.locals if variables is None else variables
            step = {name: _plain(variables[name]) for name in (*_OUTPUTS, *_STEP)}
            step["infos"] = [_plain_info(info) for info in variables["infos"]]
            step |= {name: _plain(variables.get(name)) for name in ("lstm_states", "action_masks")}
        noise = {name: getattr(model.policy.action_dist, name, None) for name in _NOISE}
        arrays = {name: value for name, value in vars(buffer).items() if _is_data(value)}
        return {
            "start": self._start,
            "num_timesteps": model.num_timesteps,
            "buffer": arrays,
            "pos": buffer.pos,
            "step": step,
            "noise": {name: _plain(value) for name, value in noise.items() if value is not None},
        }


class RolloutInProgress:
    """
    :param data: from :meth:`Collection.in_progress`
    :param model: the algorithm that was loaded, with the states of that moment
    """

    def __init__(self, data: dict[str, Any], model: Any) -> None:
        self._data, self._model = data, model
        self._generators = None if model.generators.pending is None else dict(model.generators.pending)
        self._last = {name: getattr(model, name, None) for name in ("_last_obs", "_last_episode_starts")}
        self._states = getattr(model, "_last_lstm_states", None)
        self._n_replayed = 0
        self._is_over = False
        model.num_timesteps = data["start"]  # learn() begins another rollout only before its last step

    def fits(self, buffer: Any) -> bool:
        """
        :param buffer: a rollout buffer
        :return: whether it can go on in it
        """
        arrays = self._data["buffer"]
        return all(_shape(getattr(buffer, name, None)) == _shape(array) for name, array in arrays.items())

    def cut_episodes(self, observations: Any) -> None:
        """
        The environments begin anew: their episodes end with the last step, as if a time limit had cut them.

        :param observations: first ones of the new episodes
        """
        step = self._data["step"]
        if step is None:
            self._last = {"_last_obs": observations, "_last_episode_starts": np.ones(self._model.n_envs, bool)}
            return
        for index, info in enumerate(step["infos"]):
            if not step["dones"][index]:
                info |= {"TimeLimit.truncated": True, "terminal_observation": _row(step["new_obs"], index)}
        step["dones"] = np.ones_like(step["dones"])
        step["new_obs"] = observations

    def collect(
        self, collect: Callable[..., bool], env: VecEnv, callback: Any, buffer: Any, *args: Any, **kwargs: Any
    ) -> bool:
        """
        :param collect: the algorithm's ``collect_rollouts``
        :param env: the training environments
        :param callback: called from the next step on
        :param buffer: buffer to fill
        :param args: further positional arguments of ``collect``
        :param kwargs: further keyword arguments of ``collect``
        :return: False when a callback ended the collection
        """
        if self._data["step"] is None:
            self._take_place(buffer)
            return True
        policy = self._model.policy
        previous = policy._compiled_call_impl
        policy._compiled_call_impl = stand_in = _StandIn(self, previous or policy._call_impl)
        try:
            return collect(_ReplayedVecEnv(env, self), _ReplayedCallback(callback, env, self), buffer, *args, **kwargs)
        finally:
            if policy._compiled_call_impl is stand_in:
                policy._compiled_call_impl = previous

    def continues(self, buffer: Any) -> bool:
        """
        To be called at each step, before it enters the buffer.

        :param buffer: buffer that is filled
        :return: whether the step is one that the model has yet to take notice of
        """
        if not self._is_over and self._n_replayed > self._data["pos"]:
            self._take_place(buffer)
        return self._is_over

    def _take_place(self, buffer: Any) -> None:
        model, data = self._model, self._data
        for name, array in data["buffer"].items():
            setattr(buffer, name, array)
        buffer.pos, buffer.full = data["pos"], data["step"] is None
        vars(model).update({**self._last, "num_timesteps": data["num_timesteps"]})
        if self._states is not None:
            model._last_lstm_states = self._states
        for name, array in data["noise"].items():
            setattr(model.policy.action_dist, name, th.as_tensor(array, device=model.device))
        if self._generators is not None:
            model.generators.load_state_dict(self._generators)
            model.generators.apply_pending()
        self._is_over = True

    # ------------------------------------------------------------------ for the stand-ins

    @property
    def is_over(self) -> bool:
        """
        :return: whether environments, policy and callback are the real ones again
        """
        return self._is_over

    def outputs(self) -> tuple[Any, ...]:
        """
        :return: what the policy returned for the last step
        """
        step, device = self._data["step"], self._model.device
        outputs = tuple(th.as_tensor(step[name], device=device) for name in _OUTPUTS)
        if step["lstm_states"] is None:
            return outputs
        states = [tuple(th.as_tensor(each, device=device) for each in pair) for pair in step["lstm_states"]]
        return (*outputs, type(self._model._last_lstm_states)(*states))

    def next_step(self) -> VecEnvStepReturn:
        """
        :return: of the steps that were made before, the results of the last one; of the others, nothing that counts
        """
        step = self._data["step"]
        self._n_replayed += 1
        if self._n_replayed > self._data["pos"]:
            return step["new_obs"], step["rewards"], step["dones"], step["infos"]
        dones = np.zeros_like(step["dones"])
        return self._model._last_obs, np.zeros_like(step["rewards"]), dones, [{} for _ in dones]

    def masks(self) -> Any:
        """
        :return: the action masks of the last step
        """
        return self._data["step"]["action_masks"]


class _StandIn:
    """
    Stands in for the ``forward`` of the policy.

    :param progress: the rollout
    :param forward: what it stands in for
    """

    stands_in_for_forward = True

    def __init__(self, progress: RolloutInProgress, forward: Callable[..., Any]) -> None:
        self._progress, self._forward = progress, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(*args, **kwargs) if self._progress.is_over else self._progress.outputs()


class _ReplayedVecEnv(VecEnvWrapper):
    """
    :param venv: the training environments
    :param progress: the rollout
    """

    def __init__(self, venv: VecEnv, progress: RolloutInProgress) -> None:
        super().__init__(venv)
        self._progress = progress

    def reset(self) -> VecEnvObs:
        return self.venv.reset()

    def step_async(self, actions: np.ndarray) -> None:
        if self._progress.is_over:
            self.venv.step_async(actions)

    def step_wait(self) -> VecEnvStepReturn:
        return self.venv.step_wait() if self._progress.is_over else self._progress.next_step()

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        if method_name == "action_masks" and indices is None and not self._progress.is_over:
            return list(self._progress.masks())
        return self.venv.env_method(method_name, *args, indices=indices, **kwargs)


class _ReplayedCallback:
    """
    :param callback: the callback of the training, which was called for the steps that were made before
    :param env: the training environments
    :param progress: the rollout
    """

    def __init__(self, callback: Any, env: VecEnv, progress: RolloutInProgress) -> None:
        self._callback, self._env, self._progress = callback, env, progress

    def update_locals(self, variables: dict[str, Any]) -> None:
        self._callback.update_locals({**variables, "env": self._env, "callback": self._callback})

    def on_rollout_start(self) -> None:
        """It was called before."""

    def on_step(self) -> Any:
        return self._callback.on_step() if self._progress.is_over else True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._callback, name)


def _is_data(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(each, np.ndarray) for each in value.values())
    return isinstance(value, np.ndarray)


def _shape(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _shape(each) for name, each in value.items()}
    return (value.shape, value.dtype) if isinstance(value, np.ndarray) else None


def _row(value: Any, index: int) -> Any:
    return {name: each[index] for name, each in value.items()} if isinstance(value, dict) else value[index]


def _plain(value: Any) -> Any:
    """
    :param value: array, tensor, or dictionary or tuple of them
    :return: the same with arrays only
    """
    if isinstance(value, th.Tensor):
        return value.detach().cpu().numpy().copy()
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, tuple | list):
        return tuple(_plain(each) for each in value)
    return value.copy() if isinstance(value, np.ndarray) else value


def _plain_info(info: dict[str, Any]) -> dict[str, Any]:
    """
    :param info: of one step
    :return: what SB3 reads of it
    """
    names = ("terminal_observation", "TimeLimit.truncated", "episode", "is_success")
    return {name: _plain(info[name]) for name in names if name in info}
