"""The process that collects rollouts, seen from the inside, and the messages that it exchanges."""

import contextlib
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
import time
import traceback
from collections import deque
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, NoReturn, cast

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv, VecNormalize, unwrap_vec_normalize

from sb3_ppo_ewma._parallel.channel import Channel, dumps
from sb3_ppo_ewma._parallel.policy_copies import build_policy
from sb3_ppo_ewma._parallel.portable import load_for_collection
from sb3_ppo_ewma._parallel.shared_memory import SharedMemory
from sb3_ppo_ewma._parallel.shared_state import COLLECTION_STATE, Changes, SharedState, layers
from sb3_ppo_ewma.checkpointing.generators import GeneratorStates, StateDict

# Both processes look this often whether the other one is still there
POLL_SECONDS = 0.5
# Local variables of the loop in collect_rollouts that the rollout buffer does not have, or not as they were
_RECORDED = ("actions", "clipped_actions", "action_masks", "rewards", "dones")
# Numbers of the first answers; those of calls are above
STARTED, ATTACHED = -2, -1
# Signals that a group of processes gets as a whole, and a program may handle, as by saving its model
_SIGNALS = ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
# What a logger keeps until its next dump
LOGGED = ("name_to_value", "name_to_count", "name_to_excluded")
# Words to a worker: end; end at once; say where you are; abandon rollouts below a number
CLOSE, KILL, STACK, ABANDON = "close", "kill", "stack", "abandon "


class Call(NamedTuple):
    """
    A call of a method of the environments.

    :param number: of the call, which its answer repeats
    :param depth: 0 for the outermost wrapper, 1 for what it wraps, and so on
    :param name: name of the method
    :param arguments: pickle of its positional and its keyword arguments
    """

    number: int
    depth: int
    name: str
    arguments: bytes


class Result(NamedTuple):
    """
    What a method of the environments returned.

    :param value: the value
    :param changes: what the method has changed; ``None`` without an algorithm
    :param original_rewards: (n_envs,) before a ``VecNormalize`` normalised them; ``None`` if it made no step
    :param generators: states of the random number generators; ``None`` where they are this process's own
    """

    value: Any
    changes: Changes | None
    original_rewards: np.ndarray | None
    generators: StateDict | None


class PolicyUpdate(NamedTuple):
    """
    Announces a new policy to the worker.

    :param version: its number
    :param rest: from :func:`~sb3_ppo_ewma._parallel.policy_copies.policy_copy`; ``None``: as before
    :param tensors: its tensors; ``None``: they are in the shared memory
    """

    version: int
    rest: bytes | None
    tensors: list[np.ndarray] | None


class RolloutRequest(NamedTuple):
    """
    Asks for a rollout.

    :param number: of the rollout
    :param version: of the policy to collect with; ``None``: the newest
    :param n_steps: steps of each environment
    :param args: further positional arguments of ``collect_rollouts``
    :param kwargs: further keyword arguments of ``collect_rollouts``
    :param state: from :func:`collection_state`; empty: collection goes on where it is
    """

    number: int
    version: int | None
    n_steps: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    state: dict[str, Any]


class CollectedRollout(NamedTuple):
    """
    A rollout, apart from the arrays in shared memory.

    :param number: of the rollout
    :param version: of its policy
    :param idle_seconds: how long the worker waited before it started this rollout
    :param recorded: by name of a local variable, its values at all steps, (n_steps, n_envs, ...)
    :param original_rewards: (n_steps, n_envs) before a ``VecNormalize`` normalised them; ``None`` without one
    :param infos: of each step, a dictionary for each environment
    :param ending: arguments with which the buffer computed its advantages, by name
    :param state: from :func:`collection_state`, after the last step
    :param changes: what collecting has changed
    :param generators: states of the random number generators after the last step
    :param log: what collecting has logged, by attribute of the logger
    """

    number: int
    version: int
    idle_seconds: float
    recorded: dict[str, np.ndarray]
    original_rewards: np.ndarray | None
    infos: list[Any]
    ending: dict[str, Any]
    state: dict[str, Any]
    changes: Changes
    generators: StateDict
    log: dict[str, dict[str, Any]]


def collection_state(model: Any) -> dict[str, Any]:
    """
    :param model: the algorithm
    :return: the attributes that collection carries from one rollout to the next, with tensors on the CPU
    """
    state = {name: vars(model)[name] for name in COLLECTION_STATE if name in vars(model)}
    return {name: _on_device(value, th.device("cpu")) for name, value in state.items()}


def set_collection_state(model: Any, state: dict[str, Any]) -> None:
    """
    :param model: the algorithm
    :param state: from :func:`collection_state`
    """
    for name, value in state.items():
        setattr(model, name, _on_device(value, model.device))


def _on_device(value: Any, device: th.device) -> Any:
    if isinstance(value, th.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        moved = [_on_device(each, device) for each in value]
        return type(value)(*moved) if hasattr(value, "_fields") else tuple(moved)
    return value


class Worker:
    """
    Holds environments, and collects rollouts with the algorithm's own loop. Built in the process that
    trains; :meth:`run` is called in the process that it starts.

    :param connection: the worker's end of a pipe
    :param env: environments; or a function without arguments that makes them
    :param timeout: seconds that a hanging environment gets after the end of the process that trains, without a model
    """

    def __init__(self, connection: "Connection[Any, Any]", env: Any, timeout: float) -> None:
        self._connection, self._env, self._own_timeout = connection, env, timeout
        self._messages: deque[tuple[str, Any]] = deque()
        self._generators = GeneratorStates(th.device("cpu"))
        self._shares_generators = False
        self._shared: SharedState | None = None
        self._policies: dict[int, PolicyUpdate] = {}
        self.is_closing = threading.Event()
        # Rollouts with numbers below this one need not be collected, or collected to their end
        self.n_abandoned = 0

    def attach(self, model: Any, memory: SharedMemory, shares_generators: bool, with_innermost: bool) -> None:
        """
        :param model: the algorithm to collect for, which then belongs to this process
        :param memory: shared memory
        :param shares_generators: whether results carry the states of the random number generators
        :param with_innermost: whether both processes have the same innermost environments
        """
        self._model, self._memory, self._env = model, memory, model.env
        self._shares_generators = shares_generators
        self._policies, self.n_abandoned = {}, 0
        model._collector = model._data_parallel = None  # collect here, for this process
        model.ep_info_buffer, model.ep_success_buffer = deque(maxlen=1), deque(maxlen=1)
        model.device = model.rollout_buffer.device = th.device("cpu")
        model.set_logger(Logger(folder=None, output_formats=[]))
        self._shared = SharedState(model, with_innermost, prevails=False)

    @property
    def _timeout(self) -> float:
        own = self._own_timeout if self._shared is None else self._model.collector_timeout
        return float(min(own, threading.TIMEOUT_MAX))

    def run(self, parent_connection: "Connection[Any, Any] | None" = None) -> None:
        """
        Answer messages until the process that trains ends or says ``CLOSE``.

        :param parent_connection: the other end of the pipe, which a fork has copied
        """
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C ends the parent, which ends this process
        _leave_signals_to_parent()
        if parent_connection is not None:
            parent_connection.close()
        th.set_num_threads(1)  # the parent's threads are not forked
        self._main_thread = threading.get_ident()
        self._channel = Channel(self._connection, self._hear)
        threading.Thread(target=self._watch_parent, daemon=True).start()
        try:
            if not isinstance(self._env, VecEnv):
                self._env = self._env()
            description = self._env.num_envs, self._env.observation_space, self._env.action_space
            self._channel.send(("result", (STARTED, True, dumps(description))))
            self._serve()
        except BaseException as error:
            self._send_error("failed", error)
        try:
            self._close_environments()
        except BaseException as error:
            self._send_error("failed", error)
        self._channel.flush(self._timeout)

    def _hear(self, channel: Channel, word: str) -> bool:
        if word.startswith(ABANDON):
            self.n_abandoned = int(word[len(ABANDON) :])
        elif word == KILL:
            self._exit_at_once()
        elif word == STACK:
            frame = sys._current_frames()[self._main_thread]
            channel.send(("stack", "".join(traceback.format_stack(frame))))
        else:  # CLOSE, or the other process has ended
            self.is_closing.set()
        return self.is_closing.is_set()

    def _watch_parent(self) -> None:
        starter, trainer = os.getppid(), multiprocessing.parent_process()
        # Other processes may hold the other end of the pipe, so that its end is not heard.
        while not self.is_closing.wait(POLL_SECONDS):
            if os.getppid() != starter or (trainer is not None and not trainer.is_alive()):
                self.is_closing.set()
        time.sleep(self._timeout)  # ends with the process
        self._exit_at_once()

    def _exit_at_once(self) -> NoReturn:
        """End this process while it hangs, and those of its environments, which may be the reason."""
        for process in getattr(getattr(self._env, "unwrapped", None), "processes", ()):
            with contextlib.suppress(Exception):  # of a kind that cannot be killed
                process.kill()
        os._exit(1)

    def _serve(self) -> None:
        idle_since = time.perf_counter()
        while not self.is_closing.is_set():
            self._take_messages()
            if not self._messages:
                continue
            kind, content = self._messages.popleft()
            if kind == "attach":
                data, memory, shares_generators = content
                model = load_for_collection(data, self._env.unwrapped)
                self.attach(model, memory, shares_generators, with_innermost=False)
                self._channel.send(("result", (ATTACHED, True, dumps(None))))
            elif kind == "call":
                self._answer_call(content)
            elif kind == "changes" and self._shared is not None:
                self._shared.take(self._model, content)
            elif kind == "generators":
                self._generators.load_state_dict(content)
                self._generators.apply_pending()
            elif content.number < self.n_abandoned:
                self._channel.send(("rollout", None))
            else:
                rollout = self._collect(content, time.perf_counter() - idle_since)
                idle_since = time.perf_counter()
                self._channel.send(("rollout", None if rollout is None else dumps(rollout)))

    def _take_messages(self) -> None:
        timeout = 0.0 if self._messages else POLL_SECONDS
        with contextlib.suppress(queue.Empty, EOFError):
            while True:
                kind, content = self._channel.receive(timeout)
                timeout = 0.0
                if kind == "policy":
                    self._take_policy(content)
                else:
                    self._messages.append((kind, content))

    def _take_policy(self, update: PolicyUpdate) -> None:
        if update.rest is None:
            update = update._replace(rest=self._policies[max(self._policies)].rest)
        self._policies[update.version] = update
        for version in [each for each in self._policies if each <= update.version - self._memory.n_slots]:
            del self._policies[version]

    def _answer_call(self, call: Call) -> None:
        try:
            args, kwargs = pickle.loads(call.arguments)
            venv = unwrap_vec_normalize(self._env)
            before = None if venv is None else venv.old_reward
            value = getattr(layers(self._env)[call.depth], call.name)(*args, **kwargs)
            rewards = None if venv is None or venv.old_reward is before else venv.old_reward
            changes = None if self._shared is None else self._shared.changes(self._model)
            generators = self._generators.state_dict() if self._shares_generators else None
            try:
                data = dumps(Result(value, changes, rewards, generators))
            except TypeError as error:
                raise TypeError(f"the result of {call.name}() cannot be sent from its process: {error}") from None
            self._channel.send(("result", (call.number, True, data)))
        except BaseException as error:
            self._channel.send(("result", (call.number, False, dumps((_picklable(error), traceback.format_exc())))))

    def _send_error(self, kind: str, error: BaseException) -> None:
        self._channel.send((kind, (_picklable(error), traceback.format_exc())))

    # ------------------------------------------------------------------ rollouts

    def _collect(self, request: RolloutRequest, idle_seconds: float) -> CollectedRollout | None:
        model, buffer, venv = self._model, self._model.rollout_buffer, self._model.get_vec_normalize_env()
        shared = cast(SharedState, self._shared)
        set_collection_state(model, request.state)
        version = max(self._policies) if request.version is None else request.version
        update = self._policies[version]
        tensors = self._memory.policy(version) if update.tensors is None else update.tensors
        model.policy = build_policy(update.rest or b"", tensors)
        buffers = {name: each.clone() for name, each in model.policy.named_buffers()}
        recorder = _StepRecorder(self, self._memory, request.number, venv)
        recorder.init_callback(model)
        with recorder.recording_end(buffer):
            model._collect_here(model.env, recorder, buffer, request.n_steps, *request.args, **request.kwargs)
        if recorder.is_abandoned:
            return None
        _check_unchanged(model.policy, buffers)
        self._memory.write_rollout(request.number, buffer)
        return CollectedRollout(
            request.number,
            version,
            idle_seconds,
            {name: np.stack(values) for name, values in recorder.recorded.items()},
            None if venv is None else np.stack(recorder.original_rewards),
            recorder.infos,
            recorder.ending,
            collection_state(model),
            shared.changes(model),
            self._generators.state_dict(),
            self._take_log(),
        )

    def _take_log(self) -> dict[str, dict[str, Any]]:
        logged = {name: dict(getattr(self._model.logger, name)) for name in LOGGED}
        self._model.logger.dump()
        return logged

    def _close_environments(self) -> None:
        if not isinstance(self._env, VecEnv):
            return
        base = self._env.unwrapped
        if isinstance(base, SubprocVecEnv) and any(process._parent_pid != os.getpid() for process in base.processes):
            base.closed = True  # its processes are children of the parent, which ends them
        self._env.close()


class _StepRecorder(BaseCallback):
    """
    Keeps what callbacks see at each step and the rollout buffer lacks, and ends the collection of an abandoned rollout.

    :param worker: knows what is abandoned
    :param memory: shared memory, which counts the steps
    :param number: of the rollout
    :param venv: environments that normalise rewards, if there are any
    """

    def __init__(self, worker: Worker, memory: SharedMemory, number: int, venv: VecNormalize | None) -> None:
        super().__init__()
        self._worker, self._memory, self._number, self._venv = worker, memory, number, venv
        self.recorded: dict[str, list[np.ndarray]] = {}
        self.original_rewards: list[np.ndarray] = []
        self.infos: list[Any] = []
        self.ending: dict[str, Any] = {}
        self.is_abandoned = False

    @contextlib.contextmanager
    def recording_end(self, buffer: Any) -> Any:
        """
        Within this context, :attr:`ending` gets the arguments with which the buffer computes its advantages.

        :param buffer: rollout buffer
        """
        compute = buffer.compute_returns_and_advantage

        def recorded(last_values: th.Tensor, dones: np.ndarray) -> None:
            self.ending = {"last_values": last_values.clone(), "dones": dones.copy()}
            compute(last_values, dones)

        buffer.compute_returns_and_advantage = recorded
        try:
            yield
        finally:
            del buffer.compute_returns_and_advantage

    def _on_step(self) -> bool:
        self._memory.count_step()
        if self._worker.is_closing.is_set() or self._worker.n_abandoned > self._number:
            self.is_abandoned = True
            return False
        for name in _RECORDED:
            if isinstance(self.locals.get(name), np.ndarray):
                # SB3 adds the value of the last observation to the rewards of truncated episodes, in place.
                self.recorded.setdefault(name, []).append(np.array(self.locals[name]))
        infos = self.locals["infos"]
        self.infos.append(type(infos)([_copy_of(info) for info in infos]))
        if self._venv is not None:
            self.original_rewards.append(self._venv.get_original_reward())
        return True


def _copy_of(info: dict[str, Any]) -> dict[str, Any]:
    # Environments may use one dictionary for all steps, or arrays in it.
    return {name: value.copy() if isinstance(value, np.ndarray) else value for name, value in info.items()}


def _check_unchanged(policy: th.nn.Module, buffers: dict[str, th.Tensor]) -> None:
    """
    :param policy: policy that has collected
    :param buffers: its buffers before
    :raises ValueError: if one has changed, which the policy that trains would not know
    """
    for name, each in policy.named_buffers():
        if name in buffers and not th.equal(each, buffers[name]):
            raise ValueError(
                f"the policy changes its buffer {name!r} while it collects, which collection in another process "
                "(max_policy_lag) cannot bring back: use max_policy_lag=None"
            )


def _leave_signals_to_parent() -> None:
    """Let signals do nothing here whose handlers a fork has copied: they are for the parent, which ends this one."""
    numbers = [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]
    handled = [number for number in numbers if callable(signal.getsignal(number))]
    for number in handled:
        signal.signal(number, _do_nothing)
    if handled:
        os.register_at_fork(after_in_child=partial(_end_by, handled))  # processes of the environments


def _do_nothing(*_: Any) -> None:
    pass


def _end_by(signals: list[int]) -> None:
    for number in signals:
        signal.signal(number, signal.SIG_DFL)


def _picklable(error: BaseException) -> BaseException:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
