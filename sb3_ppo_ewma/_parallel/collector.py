"""
Asynchronous collection: another process collects the next rollouts while this one trains. It is forked from this
process, with the environments as they are; policies and large arrays go through shared memory.
"""

import contextlib
import copy
import math
import multiprocessing
import pickle
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, cast

import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv

from sb3_ppo_ewma._parallel.as_ready import check_as_ready, end_processes
from sb3_ppo_ewma._parallel.policy_copies import policy_copy
from sb3_ppo_ewma._parallel.portable import dump_for_collection
from sb3_ppo_ewma._parallel.remote_methods import RemoteMethods
from sb3_ppo_ewma._parallel.replay import replay_steps
from sb3_ppo_ewma._parallel.shared_memory import SharedMemory
from sb3_ppo_ewma._parallel.shared_state import Changes, SharedState
from sb3_ppo_ewma._parallel.worker import (
    ATTACHED,
    CollectedRollout,
    PolicyUpdate,
    RolloutRequest,
    Worker,
    collection_state,
    set_collection_state,
)
from sb3_ppo_ewma._parallel.worker_process import WorkerProcess
from sb3_ppo_ewma.checkpointing.generators import GeneratorStates, StateDict, derived_states, seed_from

# Who collects in environments, by the innermost of them
_collectors: "weakref.WeakKeyDictionary[VecEnv, weakref.ref[Collector]]" = weakref.WeakKeyDictionary()


class Collector:
    """
    Collection in another process. Until it ends, the methods of the environments act there.

    :param model: the algorithm, with the environments to collect in
    """

    def __init__(self, model: Any) -> None:
        self._env, self._lag, self._mode = model.env, model.max_policy_lag, model.lag_mode
        self._owns_process = not hasattr(model.env.unwrapped, "worker_process")
        # Without lag, only one of the processes draws random numbers at a time: both then draw from one sequence.
        self._generators: GeneratorStates | None = model.generators if self._lag == 0 else None
        self._generators_of_worker: StateDict | None = None
        self._is_closed = False
        self._version = -1
        self._n_requested = self._n_received = 0
        # Whether a rollout came that could not be unpickled
        self._has_lost = False
        model.rollout_buffer.reset()
        tensors = policy_copy(model.policy).tensors
        self._rest: bytes | None = None
        self._memory = SharedMemory(model.rollout_buffer, tensors, self._lag + 1)
        self._model = weakref.ref(model)
        # Innermost environments of two kinds have nothing in common.
        self._shared = SharedState(model, with_innermost=self._owns_process, prevails=True)
        # What calls have changed, with the number of rollouts before: the environments may be ahead of the model
        self._ahead: deque[tuple[int, Changes]] = deque()
        try:
            self._process = self._start(model)
        finally:
            self._memory.unlink()
        self._process.progress = _progress(self._memory)
        reference = weakref.ref(self)
        _collectors[model.env.unwrapped] = reference
        self._methods = RemoteMethods(model.env, partial(_call, reference), partial(_close, reference))
        weakref.finalize(self, self._methods.restore)

    def _start(self, model: Any) -> WorkerProcess:
        remote = getattr(model.env.unwrapped, "worker_process", None)
        if remote is None:
            if "fork" not in multiprocessing.get_all_start_methods():
                raise ValueError(
                    f"max_policy_lag={self._lag}: this system has no fork(), so give the environments as functions to "
                    "RemoteVecEnv(env_fns)"
                )
            arguments = (model, self._memory, self._generators is not None, model.collector_timeout)
            return WorkerProcess("fork", _run_forked, arguments, model.collector_timeout)
        process: WorkerProcess = remote
        process.timeout = model.collector_timeout
        process.send("attach", (dump_for_collection(model), self._memory, self._generators is not None))
        process.result(ATTACHED)
        process.forget_rollouts()  # of a model that has gone
        return process

    @classmethod
    def prepare(cls, model: Any) -> "Collector | None":
        """
        Start, keep or end the worker, as the model's environments and parameters require. To be called when ``learn``
        begins.

        :param model: the algorithm, whose ``_collector`` is the collector so far
        :return: the collector to use from now on; ``None`` to collect in this process
        """
        check_as_ready(model)
        collector: Collector | None = model._collector
        if collector is not None and not (collector._serves(model) and collector._fits(model.rollout_buffer)):
            collector.close()
            collector = None
            model._last_obs = None  # the environments of this process did not make the worker's steps
        if collector is None and model.max_policy_lag is not None and model.env is not None:
            other = _collectors.get(model.env.unwrapped, _nothing)()
            if other is not None:  # of another model, for which the environments begin again
                other.close()
                model._last_obs = None
            if getattr(model.env.unwrapped, "is_lost_by_fork", False):  # EnvPoolVecEnv, or environments like it
                model._last_obs = None
            collector = cls(model)
        if collector is not None:
            collector._begin(model)
        return collector

    def _serves(self, model: Any) -> bool:
        present = model.env, model.max_policy_lag, model.lag_mode
        is_alive = self._process.is_alive and not self._is_closed
        return is_alive and (self._env, self._lag, self._mode) == present

    def _fits(self, buffer: Any) -> bool:
        empty = copy.copy(buffer)  # training may have flattened the arrays
        empty.reset()
        return self._memory.fits(empty)

    def _begin(self, model: Any) -> None:
        self._send_changes(model)
        has_abandoned = self._drain() or self._has_lost
        self._has_lost = False
        if has_abandoned:
            # Where the environments are is a matter of time; from here on it is not.
            model._last_obs = None
            self._ahead = deque((number, each._replace(statistics=None)) for number, each in self._ahead)
            self._take_changes(model)
            self._shared.forget()
        if self._lag == 0:
            return
        kept = model.collector_generators
        if kept.states is None:
            rank = 0 if model._data_parallel is None else model._data_parallel.group.rank
            kept.states = derived_states(model.generators.state_dict(), f"collector of rank {rank}")
        if has_abandoned or kept.states is not self._generators_of_worker:
            self._process.send("generators", kept.states)
            self._generators_of_worker = kept.states
        if has_abandoned:
            model.env.seed(seed_from(cast(StateDict, kept.states), "environments"))

    def _drain(self) -> bool:
        """
        :return: whether rollouts had been asked for that nobody took
        """
        has_abandoned = self._n_received < self._n_requested
        while self._n_received < self._n_requested:
            self._process.rollout()
            self._n_received += 1
        return has_abandoned

    def abandon_rollouts(self) -> None:
        """End the collection of what is not needed any more, within one step of the environments."""
        if self._n_received < self._n_requested and self._process.is_alive:
            self._process.abandon(self._n_requested)

    def in_copies(self) -> "EndedCollector":
        """
        :return: what copies of the model have in place of this
        """
        return EndedCollector()

    # ------------------------------------------------------------------ rollouts

    def collect_rollouts(self, model: Any, *args: Any, **kwargs: Any) -> bool:
        """
        Take the next rollout from the worker and let it go on with the present policy. Callbacks are called in this
        process, when the rollout is complete.

        :param model: the algorithm
        :param args: positional arguments of the algorithm's ``collect_rollouts``
        :param kwargs: keyword arguments of the algorithm's ``collect_rollouts``
        :return: False when a callback ended the collection
        :raises RuntimeError: if the worker has ended or made no step for ``collector_timeout`` seconds
        """
        with self._ending_with_process():
            return self._collect(model, *args, **kwargs)

    def _collect(
        self,
        model: Any,
        env: VecEnv,
        callback: BaseCallback,
        rollout_buffer: Any,
        n_rollout_steps: int,
        *args: Any,
        **kwargs: Any,
    ) -> bool:
        rollout_buffer.reset()
        is_same = env is self._env and rollout_buffer is model.rollout_buffer and self._memory.fits(rollout_buffer)
        if not (is_same and self._serves(model)):
            raise RuntimeError(
                "environments, rollout buffer and n_steps cannot change between two rollouts of one learn() with "
                "max_policy_lag"
            )
        model.policy.set_training_mode(False)
        callback.on_rollout_start()
        self._publish(model.policy)
        n_processes = 1 if model._data_parallel is None else model._data_parallel.group.size
        n_samples = n_rollout_steps * env.num_envs * n_processes
        n_missing = math.ceil((model._total_timesteps - model.num_timesteps) / n_samples)
        # A loop of the user's own may go on beyond the number of steps.
        self._request_rollouts(max(n_missing, 1), model, n_rollout_steps, args, kwargs)
        idle_since = time.perf_counter()
        rollout = self._receive_rollout(model)
        for name, logged in rollout.log.items():
            getattr(model.logger, name).update(logged)
        model.logger.record("time/learner_idle_s", time.perf_counter() - idle_since)
        model.logger.record("time/collector_idle_s", rollout.idle_seconds)
        model.logger.record("time/policy_lag", self._version - rollout.version)
        self._memory.fill_buffer(rollout.number, rollout_buffer)
        try:
            continues = replay_steps(model, env, callback, rollout_buffer, rollout)
        finally:
            set_collection_state(model, rollout.state)
        if continues:
            callback.update_locals(rollout.ending)
            callback.on_rollout_end()
        return continues

    def _publish(self, policy: th.nn.Module) -> None:
        self._version += 1
        own = policy_copy(policy, self._process.by_value)
        is_shared = self._memory.write_policy(self._version, own.tensors)
        rest = None if own.rest == self._rest else own.rest
        self._rest = own.rest
        self._process.send("policy", PolicyUpdate(self._version, rest, None if is_shared else own.tensors))

    def _request_rollouts(
        self, n_missing: int, model: Any, n_steps: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        n_allowed = self._n_received + min(self._lag + 1, n_missing)
        version = None if self._mode == "newest" else self._version
        while self._n_requested < n_allowed:
            is_idle = self._n_requested == self._n_received
            self._send_changes(model)
            state = {**collection_state(model), "num_timesteps": model.num_timesteps} if is_idle else {}
            request = RolloutRequest(self._n_requested, version, n_steps, args, kwargs, state)
            self._send_generators()
            self._process.send("collect", request)
            self._n_requested += 1

    def _receive_rollout(self, model: Any) -> CollectedRollout:
        data = self._process.rollout()
        self._n_received += 1
        self._has_lost = True
        rollout: CollectedRollout = pickle.loads(cast(bytes, data))
        self._has_lost = False
        self._send_changes(model)  # what is set here must not be taken for what it was before
        self._shared.take(model, rollout.changes)
        self._take_changes(model)
        if self._generators is None:
            model.collector_generators.states = self._generators_of_worker = rollout.generators
        else:
            self._take_generators(rollout.generators)
        return rollout

    # ------------------------------------------------------------------ calls

    def call(self, depth: int, name: str, *args: Any, **kwargs: Any) -> Any:
        """
        Call a method of the worker's environments, after the rollouts that were asked for before.

        :param depth: 0 for the outermost wrapper, 1 for what it wraps, and so on
        :param name: name of the method
        :param args: its positional arguments
        :param kwargs: its keyword arguments
        :return: its result
        :raises Exception: what the method raises
        """
        model = self._model()
        with self._ending_with_process():
            if model is not None:
                self._send_changes(model)
            self._send_generators()
            result = self._process.call(depth, name, *args, **kwargs)
        if model is not None:
            self._ahead.append((self._n_requested, result.changes))
            self._take_changes(model)
            if result.original_rewards is not None:
                model.get_vec_normalize_env().old_reward = result.original_rewards
        if result.generators is not None:
            self._take_generators(result.generators)
        return result.value

    def _send_changes(self, model: Any) -> None:
        self._process.timeout = model.collector_timeout
        self._process.send("changes", self._shared.changes(model))

    def _take_changes(self, model: Any) -> None:
        while self._ahead and self._ahead[0][0] <= self._n_received:
            self._shared.take(model, self._ahead.popleft()[1])

    def _send_generators(self) -> None:
        if self._generators is not None:
            self._process.send("generators", self._generators.state_dict())

    def _take_generators(self, states: StateDict) -> None:
        if self._generators is not None:
            self._generators.load_state_dict(states)
            self._generators.apply_pending()

    @contextlib.contextmanager
    def _ending_with_process(self) -> Iterator[None]:
        try:
            yield
        finally:
            if not self._process.is_alive:
                self._methods.restore()
                _mark_lost(self._env.unwrapped)

    def close(self) -> None:
        """End the worker; the environments' methods act in this process again."""
        self._is_closed = True
        self._methods.restore()
        if self._owns_process:
            self._process.end()
        elif self._process.is_alive:
            self.abandon_rollouts()
            with contextlib.suppress(Exception):  # of rollouts that nobody needs
                self._drain()


class EndedCollector:
    """In copies of a model: their environments did not make the worker's steps, so the next ``learn`` resets them."""

    def in_copies(self) -> "EndedCollector":
        """
        :return: what a copy of the copy has
        """
        return self

    def collect_rollouts(self, *args: Any, **kwargs: Any) -> bool:
        """
        :param args: as of the algorithm's method
        :param kwargs: as of the algorithm's method
        :raises RuntimeError: always
        """
        raise RuntimeError("a copy of a model with max_policy_lag collects no rollouts before its learn() has begun")

    def close(self) -> None:
        """There is nothing to close."""

    def abandon_rollouts(self) -> None:
        """There are none."""

    def _serves(self, model: Any) -> bool:
        return False


@contextlib.contextmanager
def ending_collection(model: Any) -> Iterator[None]:
    """
    At the end of this context, however it comes, end the collection of what is not needed any more.

    :param model: the algorithm
    """
    try:
        yield
    finally:
        if model._collector is not None:
            model._collector.abandon_rollouts()


def _run_forked(
    connection: "Connection[Any, Any]",
    parent_connection: "Connection[Any, Any]",
    model: Any,
    memory: SharedMemory,
    shares_generators: bool,
    timeout: float,
) -> None:
    worker = Worker(connection, model.env, timeout)
    worker.attach(model, memory, shares_generators, with_innermost=True)
    worker.run(parent_connection)


def _progress(memory: SharedMemory) -> Callable[[], int]:
    return lambda: memory.n_steps


def _call(reference: "weakref.ref[Collector]", *args: Any, **kwargs: Any) -> Any:
    collector = reference()
    if collector is None:
        raise RuntimeError("the process with these environments has ended")
    return collector.call(*args, **kwargs)


def _close(reference: "weakref.ref[Collector]") -> None:
    collector = reference()
    if collector is not None:
        collector.close()
        collector._process.raise_last()


def _mark_lost(env: VecEnv) -> None:
    """
    :param env: the innermost environments, whose process has ended before it was told to
    """
    if isinstance(env, DummyVecEnv) or getattr(env, "is_lost_by_fork", False):
        return  # this process has its own, as they were before
    if isinstance(env, SubprocVecEnv):
        end_processes(env, env.remotes)  # they may wait for somebody to read their answers

    def refuse(depth: int, name: str, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(
            f"{name}() of these environments cannot be called any more: the process that collected rollouts in them "
            "has ended before its time. Make new ones and give them to the model: model.set_env(env)"
        )

    RemoteMethods(env, refuse, _nothing)


def _nothing() -> None:
    pass
