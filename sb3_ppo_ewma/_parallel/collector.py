"""
Asynchronous collection: another process collects the next rollouts while this one trains. It is forked from this
process, with the environments as they are and a copy of the policy; large arrays go through shared memory.
"""

import contextlib
import math
import multiprocessing
import multiprocessing.connection
import signal
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_ppo_ewma._parallel.normalization import set_statistics
from sb3_ppo_ewma._parallel.shared_memory import SharedMemory, parameter_arrays
from sb3_ppo_ewma._parallel.worker import (
    POLL_SECONDS,
    CollectedRollout,
    RolloutRequest,
    Worker,
    collection_state,
    set_collection_state,
)
from sb3_ppo_ewma.checkpointing.generators import GeneratorStates
from sb3_ppo_ewma.policies import copy_policy

# Methods of the environments that act in the worker while it runs
_ENV_METHODS = ("reset", "step", "step_async", "step_wait", "env_method", "get_attr", "set_attr", "seed",
                "set_options", "env_is_wrapped", "get_images", "render")  # fmt: skip
_NORMALIZE_METHODS = ("get_original_obs",)
_REPLACED = {*_ENV_METHODS, *_NORMALIZE_METHODS, "close", "__getstate__"}
_SECONDS_TO_END = 5


class Collector:
    """
    The worker process, seen from the process that trains. Until it ends, the methods of the environments act in the
    worker.

    :param model: the algorithm, with the environments to collect in
    """

    def __init__(self, model: Any) -> None:
        context = multiprocessing.get_context("fork")
        self._env, self._lag, self._timeout = model.env, model.async_rollouts, model.async_timeout
        # Without lag, only one of the processes draws random numbers at a time: both then draw from one sequence.
        shares_generators = self._lag == 0
        self._generators: GeneratorStates | None = model.generators if shares_generators else None
        self._version = -1
        self._n_requested = self._n_received = 0
        self._rollouts: deque[CollectedRollout] = deque()
        self._results: deque[Any] = deque()
        model.rollout_buffer.reset()
        policy = _policy_on_cpu(model)
        self._memory = SharedMemory(model.rollout_buffer, policy, self._lag + 1, context)
        self._connection, connection = context.Pipe()
        worker = Worker(model, policy, connection, self._connection, self._memory, shares_generators)
        self._process: Any = context.Process(target=worker.run, name="collector", daemon=True)
        self._process.start()
        connection.close()
        replaced: list[tuple[Any, str]] = []
        self._finalizer = weakref.finalize(self, _end, self._process, self._connection, replaced)
        _redirect_methods(weakref.ref(self), model.env, model.get_vec_normalize_env(), replaced)

    @classmethod
    def prepare(cls, model: Any) -> "Collector | None":
        """
        Start, keep or end the worker, as the model's environments and ``async_rollouts`` require. To be called when
        ``learn`` begins.

        :param model: the algorithm, whose ``_collector`` is the collector so far
        :return: the collector to use from now on; ``None`` to collect in this process
        """
        collector: Collector | None = model._collector
        if collector is not None and not collector._serves(model.env, model.async_rollouts):
            collector.close()
            collector = None
            model._last_obs = None  # the environments of this process did not make the worker's steps
        if collector is None and model.async_rollouts is not None and model.env is not None:
            if getattr(model.env.unwrapped, "is_lost_by_fork", False):  # EnvPoolVecEnv, or environments like it
                model._last_obs = None
            collector = cls(model)
        if collector is not None:
            set_collection_state(model, collector._discard_rollouts())
        return collector

    def _serves(self, env: VecEnv | None, lag: int | None) -> bool:
        return self._finalizer.alive and self._env is env and self._lag == lag

    # ------------------------------------------------------------------ rollouts

    def collect_rollouts(
        self,
        model: Any,
        env: VecEnv,
        callback: BaseCallback,
        rollout_buffer: Any,
        n_rollout_steps: int,
        *args: Any,
        **kwargs: Any,
    ) -> bool:
        """
        Take the next rollout from the worker and let it go on with the present policy. Callbacks are called in this
        process, when the rollout is complete.

        :param model: the algorithm
        :param env: the training environments
        :param callback: called for every step
        :param rollout_buffer: buffer to fill
        :param n_rollout_steps: number of steps of each environment
        :param args: further positional arguments of the algorithm's ``collect_rollouts``
        :param kwargs: further keyword arguments of the algorithm's ``collect_rollouts``
        :return: False when a callback ended the collection
        :raises RuntimeError: if the worker has ended or made no step for ``async_timeout`` seconds
        """
        n_missing = math.ceil((model._total_timesteps - model.num_timesteps) / (n_rollout_steps * env.num_envs))
        self._publish(model.policy)
        self._request_rollouts(n_missing, model, args, kwargs)
        callback.on_rollout_start()
        idle_since = time.perf_counter()
        rollout = self._receive_rollout()
        model.logger.record("time/learner_idle_s", time.perf_counter() - idle_since)
        model.logger.record("time/collector_idle_s", rollout.idle_seconds)
        model.logger.record("time/policy_lag", self._version - rollout.version)
        self._memory.fill_buffer(rollout_buffer, rollout.slot)
        venv = model.get_vec_normalize_env()
        if venv is not None and rollout.statistics is not None:
            set_statistics(venv, rollout.statistics)
        try:
            continues = _replay_steps(model, env, callback, rollout_buffer, rollout)
        finally:
            set_collection_state(model, rollout.state)
        if continues:
            callback.on_rollout_end()
        return continues

    def _publish(self, policy: th.nn.Module) -> None:
        arrays = parameter_arrays(policy)
        while not self._memory.lock.acquire(timeout=POLL_SECONDS):
            if not self._process.is_alive():  # it died with the lock
                self._raise_ended()
        try:
            self._version += 1
            self._memory.write_parameters(arrays, self._version)
        finally:
            self._memory.lock.release()

    def _request_rollouts(self, n_missing: int, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        n_allowed = self._n_received + min(self._lag + 1, n_missing)
        while self._n_requested < n_allowed:
            is_idle = self._n_requested == self._n_received
            slot = self._n_requested % self._memory.n_slots
            state = collection_state(model) if is_idle else None
            self._send("collect", RolloutRequest(slot, args, kwargs, state))
            self._n_requested += 1

    def _receive_rollout(self) -> CollectedRollout:
        self._wait_for(self._rollouts)
        self._n_received += 1
        return self._rollouts.popleft()

    def _discard_rollouts(self) -> dict[str, Any]:
        """
        :return: state of the collection after the requested rollouts, empty if there are none
        """
        state: dict[str, Any] = {}
        while self._n_received < self._n_requested:
            state = self._receive_rollout().state
        return state

    # ------------------------------------------------------------------ messages

    def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """
        Call a method of the worker's environments, between two rollouts.

        :param name: name of the method
        :param args: its positional arguments
        :param kwargs: its keyword arguments
        :return: its result
        """
        self._send("call", (name, args, kwargs))
        self._wait_for(self._results)
        return self._results.popleft()

    def _send(self, kind: str, content: Any) -> None:
        generators = None if self._generators is None else self._generators.state_dict()
        with contextlib.suppress(BrokenPipeError):  # waiting for the answer raises the error
            self._connection.send((kind, content, generators))

    def _wait_for(self, answers: deque[Any]) -> None:
        n_steps, since = -1, time.monotonic()
        while not answers:
            ready = multiprocessing.connection.wait([self._connection, self._process.sentinel], POLL_SECONDS)
            if self._connection in ready:
                self._read_answer()
            elif ready:
                self._raise_ended()
            elif n_steps != self._memory.n_steps:
                n_steps, since = self._memory.n_steps, time.monotonic()
            elif time.monotonic() - since > self._timeout:
                self._end_and_raise(
                    RuntimeError(
                        f"The process that collects rollouts has made no step for {self._timeout:.0f} seconds "
                        "(async_timeout)"
                    )
                )

    def _read_answer(self) -> None:
        try:
            kind, content, generators = self._connection.recv()
        except (EOFError, ConnectionResetError):
            self._raise_ended()
        if kind == "error":
            error, text = content
            error.__cause__ = _WorkerTraceback(text)
            self._end_and_raise(error)
        (self._rollouts if kind == "rollout" else self._results).append(content)
        if self._generators is not None:
            self._generators.load_state_dict(generators)
            self._generators.apply_pending()

    # ------------------------------------------------------------------ the end of the process

    def close(self) -> None:
        """End the worker; the environments' methods act in this process again."""
        if self._finalizer.alive:
            self._send("close", None)
            self._finalizer()

    def _raise_ended(self) -> NoReturn:
        self._process.join(_SECONDS_TO_END)
        code = self._process.exitcode
        how = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        self._end_and_raise(RuntimeError(f"The process that collects rollouts has ended ({how})"))

    def _end_and_raise(self, error: BaseException) -> NoReturn:
        self._process.kill()
        self._finalizer()
        raise error


class _WorkerTraceback(Exception):  # noqa: N818  # the cause of an error, as in concurrent.futures
    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def _policy_on_cpu(model: Any) -> th.nn.Module:
    """
    :param model: the algorithm
    :return: the policy that the worker gets with the fork; a copy if the model is on an accelerator, which it must not
        touch
    """
    policy: th.nn.Module = model.policy if model.device.type == "cpu" else copy_policy(model.policy).to("cpu")
    return policy


def _end(process: Any, connection: Any, replaced: list[tuple[Any, str]]) -> None:
    """
    :param process: the worker's, which gets some seconds to end before it is killed
    :param connection: this process's end of the pipe
    :param replaced: from :func:`_redirect_methods`
    """
    for reference, name in replaced:
        owner = reference()
        if owner is not None:
            vars(owner).pop(name, None)
    connection.close()
    process.join(_SECONDS_TO_END)
    if process.exitcode is None:
        process.kill()
        process.join()
    process.close()


# === Methods of the environments ===


def _redirect_methods(
    collector: "weakref.ref[Collector]",
    env: VecEnv,
    normalizing: VecNormalize | None,
    replaced: list[tuple[Any, str]],
) -> None:
    """
    Let methods of the environments act in the worker.

    :param collector: the collector; its worker ends when nothing else refers to it
    :param env: the training environments
    :param normalizing: the wrapper among them that normalises
    :param replaced: filled with a reference to the owner and the name of each method
    """
    env_reference = weakref.ref(env)

    def remote(name: str) -> Callable[..., Any]:
        def method(*args: Any, **kwargs: Any) -> Any:
            alive = collector()
            if alive is None:
                raise RuntimeError("the process with these environments has ended")
            return alive.call(name, *args, **kwargs)

        return method

    def close() -> None:
        alive, own = collector(), env_reference()
        if alive is not None:
            alive.close()
        if own is not None:
            own.close()  # the method of its class again

    methods: list[tuple[Any, str, Callable[..., Any]]] = [(env, "close", close)]
    methods += [(env, name, remote(name)) for name in _ENV_METHODS if hasattr(env, name)]
    if normalizing is not None:
        methods += [(normalizing, name, remote(name)) for name in _NORMALIZE_METHODS]
    # VecNormalize is pickled to save its statistics; functions in its place of methods could not be.
    owners = {id(owner): owner for owner, _, _ in methods}.values()
    methods += [(owner, "__getstate__", _getstate_without_methods(owner)) for owner in owners]
    for owner, name, method in methods:
        setattr(owner, name, method)
        replaced.append((weakref.ref(owner), name))


def _getstate_without_methods(owner: Any) -> Callable[[], dict[str, Any]]:
    reference = weakref.ref(owner)

    def getstate() -> dict[str, Any]:
        own: Any = reference()
        method = getattr(type(own), "__getstate__", None)  # since Python 3.11 every class has it
        attributes = vars(own) if method is None else method(own)
        return {name: value for name, value in attributes.items() if name not in _REPLACED}

    return getstate


# === Callbacks ===


def _replay_steps(model: Any, env: VecEnv, callback: BaseCallback, buffer: Any, rollout: CollectedRollout) -> bool:
    """
    Count the steps of a rollout and call for each what SB3 calls.

    :param model: the algorithm
    :param env: the training environments
    :param callback: called for every step, with the local variables of SB3's loop
    :param buffer: rollout buffer with the rollout
    :param rollout: the rollout
    :return: False when the callback ended the collection
    """
    observations = _as_returned(buffer.observations, model.observation_space)
    venv = model.get_vec_normalize_env()
    n_steps = buffer.buffer_size
    callback.update_locals(
        {"self": model, "env": env, "callback": callback, "rollout_buffer": buffer, "n_rollout_steps": n_steps}
    )
    for step, variables in enumerate(_local_variables(model, buffer, observations, rollout)):
        model._last_obs = _row(observations, step)
        if venv is not None and rollout.original_rewards is not None:
            venv.old_reward = rollout.original_rewards[step]
        model.num_timesteps += env.num_envs
        callback.update_locals(variables)
        if not callback.on_step():
            return False
        model._update_info_buffer(variables["infos"], variables["dones"])
    return True


def _local_variables(model: Any, buffer: Any, observations: Any, rollout: CollectedRollout) -> Iterator[dict[str, Any]]:
    """
    :param model: the algorithm
    :param buffer: rollout buffer with the rollout
    :param observations: (n_steps, n_envs, ...) its observations
    :param rollout: the rollout
    :return: for each step, the local variables of SB3's loop when it calls the callbacks
    """
    n_steps, n_envs, space = buffer.buffer_size, buffer.n_envs, model.action_space
    actions = buffer.actions.reshape(n_steps, n_envs, *space.shape).astype(space.dtype)
    clipped_actions = actions
    if isinstance(space, spaces.Box):
        if model.policy.squash_output:
            clipped_actions = model.policy.unscale_action(actions)
        else:
            clipped_actions = np.clip(actions, space.low, space.high)
    obs_tensors = obs_as_tensor(observations, th.device("cpu"))
    values, log_probs = th.as_tensor(buffer.values[..., None]), th.as_tensor(buffer.log_probs)
    dones = np.concatenate([buffer.episode_starts[1:], rollout.state["_last_episode_starts"][None]]).astype(bool)
    family: dict[str, Any] = {}
    if hasattr(buffer, "action_masks"):
        family["action_masks"] = buffer.action_masks
    if hasattr(buffer, "hidden_states_pi"):  # recurrent
        family["episode_starts"] = th.as_tensor(buffer.episode_starts, dtype=th.float32)
    for step in range(n_steps):
        yield {
            **{name: rows[step] for name, rows in family.items()},
            "n_steps": step,
            "obs_tensor": _row(obs_tensors, step),
            "actions": actions[step],
            "clipped_actions": clipped_actions[step],
            "values": values[step],
            "log_probs": log_probs[step],
            "new_obs": rollout.state["_last_obs"] if step + 1 == n_steps else _row(observations, step + 1),
            "rewards": rollout.rewards[step],
            "dones": dones[step],
            "infos": rollout.infos[step],
        }


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
    if isinstance(observations, dict):
        return {name: each[step] for name, each in observations.items()}
    return observations[step]
