"""The process that collects rollouts, seen from the inside, and the messages that it exchanges."""

import contextlib
import os
import pickle
import signal
import time
import traceback
from collections import deque
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import SubprocVecEnv, VecNormalize

from sb3_ppo_ewma._parallel.normalization import Statistics, statistics_of
from sb3_ppo_ewma._parallel.shared_memory import SharedMemory

# Both processes look this often whether the other one is still there
POLL_SECONDS = 0.5
# Attributes that collection carries from one rollout to the next
_COLLECTION_STATE = ("_last_obs", "_last_episode_starts", "_last_lstm_states", "_last_original_obs")


class RolloutRequest(NamedTuple):
    """
    Asks the worker for a rollout.

    :param slot: slot of the shared memory to write it to
    :param args: further positional arguments of ``collect_rollouts``
    :param kwargs: further keyword arguments of ``collect_rollouts``
    :param state: from :func:`collection_state`; ``None``: collection goes on where it is
    """

    slot: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    state: dict[str, Any] | None


class CollectedRollout(NamedTuple):
    """
    A rollout, apart from the arrays in shared memory.

    :param slot: slot of the shared memory with the rollout buffer's arrays
    :param version: number of updates that its policy has had
    :param idle_seconds: how long the worker waited before it started this rollout
    :param rewards: (n_steps, n_envs) as the environments returned them
    :param original_rewards: (n_steps, n_envs) before a ``VecNormalize`` normalised them; ``None`` without one
    :param infos: of each step, a dictionary for each environment
    :param state: from :func:`collection_state`, after the last step
    :param statistics: running statistics of a ``VecNormalize``; ``None`` without one
    """

    slot: int
    version: int
    idle_seconds: float
    rewards: np.ndarray
    original_rewards: np.ndarray | None
    infos: list[Any]
    state: dict[str, Any]
    statistics: Statistics | None


def collection_state(model: Any) -> dict[str, Any]:
    """
    :param model: the algorithm
    :return: the attributes that collection carries from one rollout to the next, with tensors on the CPU
    """
    state = {name: vars(model)[name] for name in _COLLECTION_STATE if name in vars(model)}
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
    Collects rollouts with the algorithm's own ``collect_rollouts``. Built in the process that trains; :meth:`run` is
    called in the process forked from it.

    :param model: the algorithm, whose policy and device the worker replaces in its own process
    :param policy: the policy to collect with, on the CPU
    :param connection: the worker's end of a pipe
    :param parent_connection: the end of the process that trains
    :param memory: shared memory
    :param shares_generators: whether messages carry the states of the random number generators
    """

    def __init__(
        self,
        model: Any,
        policy: th.nn.Module,
        connection: "Connection[Any, Any]",
        parent_connection: "Connection[Any, Any]",
        memory: SharedMemory,
        shares_generators: bool,
    ) -> None:
        self._model, self._policy = model, policy
        self._connection, self._parent_connection = connection, parent_connection
        self._memory = memory
        self._shares_generators = shares_generators
        self._requests: deque[RolloutRequest] = deque()
        self._parent = os.getpid()

    def run(self) -> None:
        """Answer messages until the process that trains ends or sends "close"."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C ends the parent, which ends this process
        self._parent_connection.close()
        th.set_num_threads(1)  # the parent's threads are not forked
        model = self._model
        model._collector = None  # collect here
        model.ep_info_buffer, model.ep_success_buffer = deque(maxlen=1), deque(maxlen=1)
        if self._policy is not model.policy:
            model.policy, model.device = self._policy, th.device("cpu")
            model.rollout_buffer.device = model.generators.device = model.device
        try:
            with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent has ended
                self._serve()
            self._close_environments()
        except BaseException as error:
            with contextlib.suppress(OSError):
                self._connection.send(("error", (_picklable(error), traceback.format_exc()), None))

    def _serve(self) -> None:
        idle_since = time.perf_counter()
        while True:
            while self._connection.poll(0 if self._requests else POLL_SECONDS):
                kind, content, generators = self._connection.recv()
                if kind == "close":
                    return
                if generators is not None:
                    self._model.generators.load_state_dict(generators)
                    self._model.generators.apply_pending()
                if kind == "call":
                    name, args, kwargs = content
                    self._answer("result", getattr(self._model.env, name)(*args, **kwargs))
                else:
                    self._requests.append(content)
            if self._requests:
                rollout = self._collect(self._requests.popleft(), time.perf_counter() - idle_since)
                idle_since = time.perf_counter()
                self._answer("rollout", rollout)
            elif os.getppid() != self._parent:
                return

    def _answer(self, kind: str, content: Any) -> None:
        generators = self._model.generators.state_dict() if self._shares_generators else None
        self._connection.send((kind, content, generators))

    def _collect(self, request: RolloutRequest, idle_seconds: float) -> CollectedRollout:
        model, buffer = self._model, self._model.rollout_buffer
        version = self._memory.read_parameters(self._policy)
        set_collection_state(model, request.state or {})
        venv = model.get_vec_normalize_env()
        recorder = _StepRecorder(self._memory, self._parent, venv)
        recorder.init_callback(model)
        model.collect_rollouts(model.env, recorder, buffer, model.n_steps, *request.args, **request.kwargs)
        self._memory.write_rollout(request.slot, buffer)
        return CollectedRollout(
            request.slot,
            version,
            idle_seconds,
            np.stack(recorder.rewards),
            None if venv is None else np.stack(recorder.original_rewards),
            recorder.infos,
            collection_state(model),
            None if venv is None else statistics_of(venv),
        )

    def _close_environments(self) -> None:
        base = self._model.env.unwrapped
        if isinstance(base, SubprocVecEnv):
            base.closed = True  # its processes are children of the parent, which ends them
        self._model.env.close()


class _StepRecorder(BaseCallback):
    """
    Keeps what callbacks see at each step and the rollout buffer lacks.

    :param memory: shared memory, which counts the steps
    :param parent: id of the process that trains; collection ends with it
    :param venv: environments that normalise rewards, if there are any
    """

    def __init__(self, memory: SharedMemory, parent: int, venv: VecNormalize | None) -> None:
        super().__init__()
        self._memory, self._parent, self._venv = memory, parent, venv
        self.rewards: list[np.ndarray] = []
        self.original_rewards: list[np.ndarray] = []
        self.infos: list[Any] = []

    def _on_step(self) -> bool:
        if os.getppid() != self._parent:
            raise EOFError
        self._memory.count_step()
        # SB3 adds the value of the last observation to the rewards of truncated episodes, in place.
        self.rewards.append(self.locals["rewards"].copy())
        self.infos.append(self.locals["infos"])
        if self._venv is not None:
            self.original_rewards.append(self._venv.get_original_reward())
        return True


def _picklable(error: BaseException) -> BaseException:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
