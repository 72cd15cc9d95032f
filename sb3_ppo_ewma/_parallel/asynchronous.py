"""
Asynchronous collection: a process of its own collects the next rollouts while this one trains on the last. It is a fork
of this one, with the environments as they are and a copy of the policy; what is large goes through shared memory.
"""

import contextlib
import math
import mmap
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, NoReturn

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv, VecNormalize

from sb3_ppo_ewma._parallel.normalization import Statistics, set_statistics, statistics_of
from sb3_ppo_ewma.checkpointing.generators import GeneratorStates
from sb3_ppo_ewma.checkpointing.saving import SavedStateMixin, uncompiled

# What collection hands on from one rollout to the next
_STATE = ("_last_obs", "_last_episode_starts", "_last_lstm_states", "_last_original_obs")
# Methods by which environments are reached, which are those of the process that has them
_REMOTE = ("reset", "step", "step_async", "step_wait", "env_method", "get_attr", "set_attr", "seed", "set_options",
           "env_is_wrapped", "get_images", "render")  # fmt: skip
# Of the wrapper that normalises
_ORIGINAL = "get_original_obs"
_GETSTATE = "__getstate__"
_ALIGNMENT = 64
_POLL_SECONDS = 0.5
_SECONDS_TO_END = 5


class Collected(NamedTuple):
    """
    A rollout, but for its arrays.

    :param slot: where these are
    :param version: number of trainings that its policy has had
    :param waited: seconds that the process waited before it began
    :param rewards: (n_steps, n_envs) as the environments gave them
    :param original_rewards: (n_steps, n_envs) before a ``VecNormalize``
    :param infos: of every step
    :param state: attributes of the model, by name
    :param statistics: running ones of a ``VecNormalize``
    """

    slot: int
    version: int
    waited: float
    rewards: np.ndarray
    original_rewards: np.ndarray | None
    infos: list[Any]
    state: dict[str, Any]
    statistics: Statistics | None


class Request(NamedTuple):
    """
    :param slot: where the arrays of the rollout are to go
    :param arguments: of ``collect_rollouts`` behind the number of steps
    :param state: attributes of the model, where this process has changed them
    """

    slot: int
    arguments: tuple[Any, ...]
    state: dict[str, Any] | None


class AsyncMixin(SavedStateMixin):
    """
    Rollouts from another process, where ``async_rollouts`` is not ``None``: the largest number of trainings that a
    rollout's policy may lack when the rollout is trained on. 0: nothing happens at the same time.
    """

    async_rollouts: int | None = None
    async_timeout: float = math.inf
    _collector: "Collector | None" = None
    # Whether this is the process that collects
    _collects = False

    _of_async: ClassVar[tuple[str, ...]] = ("_collector", "_collects")

    def _setup_learn(self, *args: Any, **kwargs: Any) -> Any:
        collector = self._collector
        if collector is not None and not collector.serves(self.env, self.async_rollouts):
            self._end_collector()
        if self.async_rollouts is not None and self._collector is None and self.env is not None:
            if getattr(self.env.unwrapped, "is_lost_by_fork", False):
                self._last_obs = None
            self._collector = Collector(self, self.async_rollouts, self.async_timeout)
        if self._collector is not None:
            self._take_collection_state(self._collector.discard())
        with self._collector_ends_with_errors():
            return super()._setup_learn(*args, **kwargs)

    def _end_collector(self) -> None:
        if self._collector is not None:
            self._collector.close()
            self._collector = None
            self._last_obs = None  # the environments are those of before

    @contextlib.contextmanager
    def _collector_ends_with_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception:
            if self._collector is not None and self._collector.has_failed:
                self._end_collector()
            raise

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: Any, n_rollout_steps: int, *args: Any, **kwargs: Any
    ) -> bool:
        """
        As in the algorithm this is mixed into, in this process or another one. Callbacks are called in this one, when
        the rollout is complete.

        :param env: see there
        :param callback: see there
        :param rollout_buffer: see there
        :param n_rollout_steps: see there
        :param args: see there
        :param kwargs: see there
        :return: False when a callback ended the collection
        """
        if self._collector is None or self._collects:
            return super().collect_rollouts(env, callback, rollout_buffer, n_rollout_steps, *args, **kwargs)
        with self._collector_ends_with_errors():
            return self._fetch_rollout(self._collector, env, callback, rollout_buffer, (*args, *kwargs.values()))

    def _fetch_rollout(
        self, collector: "Collector", env: VecEnv, callback: BaseCallback, buffer: Any, arguments: tuple[Any, ...]
    ) -> bool:
        n_missing = math.ceil((self._total_timesteps - self.num_timesteps) / (self.n_steps * env.num_envs))
        collector.publish(self.policy)
        collector.request(n_missing, arguments, self._collection_state)
        callback.on_rollout_start()
        began = time.perf_counter()
        collected = collector.receive()
        self.logger.record("time/learner_wait", time.perf_counter() - began)
        self.logger.record("time/collector_wait", collected.waited)
        self.logger.record("time/policy_lag", collector.version - collected.version)
        collector.fill(buffer, collected.slot)
        if self._vec_normalize_env is not None and collected.statistics is not None:
            set_statistics(self._vec_normalize_env, collected.statistics)
        try:
            continues = self._replay(env, callback, buffer, collected)
        finally:
            self._take_collection_state(collected.state)
        if continues:
            callback.on_rollout_end()
        return continues

    def _replay(self, env: VecEnv, callback: BaseCallback, buffer: Any, collected: Collected) -> bool:
        """
        Call what SB3 calls at every step, with the local variables of its loop.
        """
        n_steps = buffer.buffer_size
        shape: Any = self.action_space.shape
        actions = buffer.actions.reshape(n_steps, env.num_envs, *shape).astype(self.action_space.dtype)
        clipped_actions = actions
        if isinstance(self.action_space, spaces.Box):
            if self.policy.squash_output:
                clipped_actions = self.policy.unscale_action(actions)
            else:
                clipped_actions = np.clip(actions, self.action_space.low, self.action_space.high)
        observations = _as_given(buffer.observations, self.observation_space)
        obs_tensors = obs_as_tensor(observations, th.device("cpu"))
        values, log_probs = th.as_tensor(buffer.values[..., None]), th.as_tensor(buffer.log_probs)
        dones = np.concatenate([buffer.episode_starts[1:], collected.state["_last_episode_starts"][None]]).astype(bool)
        callback.update_locals(
            {"self": self, "env": env, "callback": callback, "rollout_buffer": buffer, "n_rollout_steps": n_steps}
        )
        for step in range(n_steps):
            new_obs = collected.state["_last_obs"] if step + 1 == n_steps else _row(observations, step + 1)
            infos = collected.infos[step]
            self._last_obs = _row(observations, step)
            if self._vec_normalize_env is not None and collected.original_rewards is not None:
                self._vec_normalize_env.old_reward = collected.original_rewards[step]
            self.num_timesteps += env.num_envs
            callback.update_locals(
                {
                    "n_steps": step,
                    "obs_tensor": _row(obs_tensors, step),
                    "actions": actions[step],
                    "clipped_actions": clipped_actions[step],
                    "values": values[step],
                    "log_probs": log_probs[step],
                    "new_obs": new_obs,
                    "rewards": collected.rewards[step],
                    "dones": dones[step],
                    "infos": infos,
                }
            )
            if not callback.on_step():
                return False
            self._update_info_buffer(infos, dones[step])
        return True

    def _collection_state(self) -> dict[str, Any]:
        state = {name: vars(self)[name] for name in _STATE if name in vars(self)}
        return {name: _on_device(value, th.device("cpu")) for name, value in state.items()}

    def _take_collection_state(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, _on_device(value, self.device))

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), *self._of_async]


def _as_given(observations: Any, space: spaces.Space[Any]) -> Any:
    """
    :param observations: of a rollout buffer, which has numbers as arrays of one entry
    :param space: theirs
    :return: as the environments gave them, (n_steps, n_envs, ...)
    """
    if isinstance(space, spaces.Dict):
        return {name: _as_given(observations[name], each) for name, each in space.spaces.items()}
    return observations.reshape(observations.shape[:2]) if isinstance(space, spaces.Discrete) else observations


def _row(observations: Any, step: int) -> Any:
    if isinstance(observations, dict):
        return {name: each[step] for name, each in observations.items()}
    return observations[step]


def _on_device(value: Any, device: th.device) -> Any:
    if isinstance(value, th.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        moved = [_on_device(each, device) for each in value]
        return type(value)(*moved) if hasattr(value, "_fields") else tuple(moved)
    return value


# === Shared memory ===


class SharedArrays:
    """
    Arrays in memory that this process shares with those that are forked from it later.

    :param like: by name, arrays of the same shapes and dtypes
    """

    def __init__(self, like: Mapping[str, np.ndarray]) -> None:
        offsets, size = {}, 0
        for name, array in like.items():
            offsets[name] = size
            size += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        memory = mmap.mmap(-1, max(size, 1))  # anonymous: it goes with the last process that has it
        self.arrays = {
            name: np.frombuffer(memory, array.dtype, array.size, offsets[name]).reshape(array.shape)
            for name, array in like.items()
        }

    def write(self, arrays: Mapping[str, np.ndarray]) -> None:
        """
        :param arrays: of the same names
        """
        for name, array in self.arrays.items():
            array[...] = arrays[name]


def _arrays_of(buffer: RolloutBuffer) -> dict[str, np.ndarray]:
    """
    :param buffer: rollout buffer
    :return: its arrays, those of dictionaries by their names behind a slash
    """
    found = {}
    for name, value in vars(buffer).items():
        if isinstance(value, np.ndarray):
            found[name] = value
        elif isinstance(value, dict) and all(isinstance(each, np.ndarray) for each in value.values()):
            found |= {f"{name}/{key}": each for key, each in value.items()}
    return found


def _tensors_of(policy: th.nn.Module) -> dict[str, th.Tensor]:
    module = uncompiled(policy)
    return {name: each.detach() for name, each in (*module.named_parameters(), *module.named_buffers())}


def _bits(tensor: th.Tensor) -> np.ndarray:
    tensor = tensor.cpu().contiguous()
    bits: np.ndarray = (tensor.view(th.int16) if tensor.dtype == th.bfloat16 else tensor).numpy()
    return bits


# === The process, from the outside ===


class Collector:
    """
    The process that collects. Its environments are reached through the given one, whose methods are those of the
    process until it ends.

    :param model: whose environments it takes over
    :param lag: largest number of trainings that the policy of a rollout may lack
    :param timeout: seconds without a step of the environments after which it is given up
    """

    def __init__(self, model: Any, lag: int, timeout: float) -> None:
        context = multiprocessing.get_context("fork")
        self.env, self.lag, self._timeout = model.env, lag, timeout
        # Without lag only one process draws random numbers at a time, and they are those of one.
        self._generators: GeneratorStates | None = model.generators if lag == 0 else None
        self.version = -1
        self.has_failed = False
        self._n_requested = self._n_received = 0
        self._rollouts: deque[Collected] = deque()
        self._results: deque[Any] = deque()
        model.rollout_buffer.reset()
        template = _arrays_of(model.rollout_buffer)
        self._slots = [SharedArrays(template) for _ in range(lag + 1)]
        policy = model.policy if model.device.type == "cpu" else model._copy_policy().to("cpu")
        self._parameters = SharedArrays({name: _bits(each) for name, each in _tensors_of(policy).items()})
        self._numbers = SharedArrays({"version": np.zeros(1, np.int64), "n_steps": np.zeros(1, np.int64)})
        self._lock = context.Lock()
        self._connection, theirs = context.Pipe()
        worker = _Worker(
            model, policy, theirs, self._connection, self._slots, self._parameters, self._numbers, self._lock
        )
        self._process: Any = context.Process(target=worker.run, name="collector", daemon=True)
        self._process.start()
        theirs.close()
        self._replaced: list[tuple[Any, str]] = []
        self._finalizer = weakref.finalize(self, _end, self._process, self._connection, self._replaced)
        self._take_over(self.env, model.get_vec_normalize_env())

    def serves(self, env: VecEnv | None, lag: int | None) -> bool:
        """
        :param env: environments
        :param lag: bound on the lag
        :return: whether the process is there, for just these
        """
        return self._finalizer.alive and self.env is env and self.lag == lag

    def _take_over(self, env: VecEnv, normalizing: VecNormalize | None) -> None:
        """
        :param env: environments
        :param normalizing: the wrapper among theirs that normalises
        """
        reference = weakref.ref(self)
        environments = weakref.ref(env)

        def remote(name: str) -> Any:
            def method(*args: Any, **kwargs: Any) -> Any:
                collector = reference()
                if collector is None:
                    raise RuntimeError("the process with these environments has ended")
                return collector.call(name, *args, **kwargs)

            return method

        def close() -> None:
            collector, own = reference(), environments()
            if collector is not None:
                collector.close()
            if own is not None:
                own.close()  # the method of its class again

        methods = [(env, name, remote(name)) for name in _REMOTE if hasattr(env, name)]
        methods += [] if normalizing is None else [(normalizing, _ORIGINAL, remote(_ORIGINAL))]
        methods += [(env, "close", close)]
        # Statistics are saved while the process is there, and what takes the place of methods is no part of them.
        methods += [
            (owner, _GETSTATE, _state_without_methods(owner)) for owner in {id(o): o for o, *_ in methods}.values()
        ]
        for owner, name, method in methods:
            setattr(owner, name, method)
            self._replaced.append((weakref.ref(owner), name))

    def publish(self, policy: th.nn.Module) -> None:
        """
        :param policy: after one more training
        """
        arrays = {name: _bits(each) for name, each in _tensors_of(policy).items()}
        while not self._lock.acquire(timeout=_POLL_SECONDS):
            if not self._process.is_alive():  # and will not give it back
                self._fail_as_it_ended()
        try:
            self._parameters.write(arrays)
            self.version += 1
            self._numbers.arrays["version"][0] = self.version
        finally:
            self._lock.release()

    def request(self, n_missing: int, arguments: tuple[Any, ...], state: Any) -> None:
        """
        Ask for as many rollouts as the bound on the lag allows.

        :param n_missing: number of rollouts until training ends
        :param arguments: of ``collect_rollouts`` behind the number of steps
        :param state: function that returns the state of the collection in this process
        """
        n_allowed = min(self._n_received + self.lag + 1, self._n_received + n_missing)
        while self._n_requested < n_allowed:
            is_first = self._n_requested == self._n_received
            slot = self._n_requested % len(self._slots)
            self._send("collect", Request(slot, arguments, state() if is_first else None))
            self._n_requested += 1

    def receive(self) -> Collected:
        """
        :return: the next rollout that was asked for
        """
        self._wait_for(self._rollouts)
        self._n_received += 1
        return self._rollouts.popleft()

    def discard(self) -> dict[str, Any]:
        """
        Forget rollouts that were asked for and are not needed any more.

        :return: state of the collection after the last of them, empty where there is none
        """
        state: dict[str, Any] = {}
        while self._n_received < self._n_requested:
            state = self.receive().state
        return state

    def fill(self, buffer: Any, slot: int) -> None:
        """
        :param buffer: rollout buffer, whose arrays become those of the slot until the next rollout is asked for
        :param slot: of a rollout
        """
        buffer.reset()
        for name, array in self._slots[slot].arrays.items():
            attribute, _, key = name.partition("/")
            if key:
                getattr(buffer, attribute)[key] = array
            else:
                setattr(buffer, attribute, array)
        buffer.pos, buffer.full = buffer.buffer_size, True

    def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """
        :param name: of a method of the environments
        :param args: its arguments
        :param kwargs: its arguments
        :return: what it returns in the process that has them, between two rollouts
        """
        self._send("call", (name, args, kwargs))
        self._wait_for(self._results)
        return self._results.popleft()

    def _send(self, kind: str, content: Any) -> None:
        generators = None if self._generators is None else self._generators.state_dict()
        with contextlib.suppress(BrokenPipeError):  # found out by what waits for the answer
            self._connection.send((kind, content, generators))

    def _wait_for(self, answers: deque[Any]) -> None:
        n_steps, since = -1, time.monotonic()
        while not answers:
            ready = multiprocessing.connection.wait([self._connection, self._process.sentinel], _POLL_SECONDS)
            if self._connection in ready:
                self._take_answer()
            elif ready:
                self._fail_as_it_ended()
            elif n_steps != (n_now := int(self._numbers.arrays["n_steps"][0])):
                n_steps, since = n_now, time.monotonic()
            elif time.monotonic() - since > self._timeout:
                self._fail(
                    RuntimeError(
                        f"The process that collects rollouts has made no step for {self._timeout:.0f} seconds "
                        "(async_timeout)"
                    )
                )

    def _take_answer(self) -> None:
        try:
            kind, content, generators = self._connection.recv()
        except (EOFError, ConnectionResetError):
            self._fail_as_it_ended()
        if kind == "error":
            error, text = content
            error.__cause__ = _RemoteTraceback(text)
            self._fail(error)
        (self._rollouts if kind == "rollout" else self._results).append(content)
        if self._generators is not None:
            self._generators.load_state_dict(generators)
            self._generators.apply_pending()

    def _fail_as_it_ended(self) -> NoReturn:
        self._process.join(_SECONDS_TO_END)
        code = self._process.exitcode
        how = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        self._fail(RuntimeError(f"The process that collects rollouts has ended ({how})"))

    def _fail(self, error: BaseException) -> NoReturn:
        self.has_failed = True
        self._process.kill()
        self._finalizer()
        raise error

    def close(self) -> None:
        """End the process; the environments in this one are those of before."""
        if self._finalizer.alive:
            self._send("close", None)
            self._finalizer()


def _state_without_methods(owner: Any) -> Callable[[], dict[str, Any]]:
    """
    :param owner: environments or a wrapper of them
    :return: what pickle asks it for, without the methods that are replaced
    """
    reference = weakref.ref(owner)

    def state() -> dict[str, Any]:
        own: Any = reference()
        method = getattr(type(own), _GETSTATE, None)  # since Python 3.11 every class has it
        attributes = vars(own) if method is None else method(own)
        return {
            name: value for name, value in attributes.items() if name not in (*_REMOTE, _ORIGINAL, "close", _GETSTATE)
        }

    return state


class _RemoteTraceback(Exception):  # noqa: N818  # shown above the error, as of a concurrent.futures
    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def _end(process: Any, connection: Any, replaced: list[tuple[Any, str]]) -> None:
    """
    :param process: to end, kindly first
    :param connection: to it
    :param replaced: references to objects and names of their methods, which are those of their classes again
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


# === The process, from the inside ===


class _Worker:
    def __init__(
        self,
        model: Any,
        policy: th.nn.Module,
        connection: Any,
        ours: Any,
        slots: list[SharedArrays],
        parameters: SharedArrays,
        numbers: SharedArrays,
        lock: Any,
    ) -> None:
        self._model, self._policy = model, policy
        self._connection, self._others = connection, ours
        self._slots, self._parameters, self._numbers, self._lock = slots, parameters, numbers, lock
        self._requests: deque[Request] = deque()
        self._parent = os.getpid()

    def run(self) -> None:
        """Until the other process ends or says so."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other process decides
        self._others.close()
        th.set_num_threads(1)  # those of the other process are not here
        self._model._collects = True
        self._model.ep_info_buffer, self._model.ep_success_buffer = deque(maxlen=1), deque(maxlen=1)
        if self._policy is not self._model.policy:
            self._model.policy, self._model.device = self._policy, th.device("cpu")
            self._model.rollout_buffer.device = self._model.generators.device = self._model.device
        try:
            with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the other one has gone
                self._serve()
            self._close()
        except BaseException as error:
            with contextlib.suppress(OSError):
                self._connection.send(("error", (_picklable(error), traceback.format_exc()), None))

    def _serve(self) -> None:
        began = time.perf_counter()
        while True:
            while self._connection.poll(0 if self._requests else _POLL_SECONDS):
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
                rollout = self._collect(self._requests.popleft(), time.perf_counter() - began)
                began = time.perf_counter()
                self._answer("rollout", rollout)
            elif os.getppid() != self._parent:
                return

    def _answer(self, kind: str, content: Any) -> None:
        generators = self._model.generators.state_dict() if len(self._slots) == 1 else None
        self._connection.send((kind, content, generators))

    def _collect(self, request: Request, waited: float) -> Collected:
        model = self._model
        version = self._load_parameters()
        for name, value in (request.state or {}).items():
            setattr(model, name, value)
        venv = model.get_vec_normalize_env()
        recorder = _Recorder(self._numbers.arrays["n_steps"], self._parent, venv)
        recorder.init_callback(model)
        buffer = model.rollout_buffer
        model.collect_rollouts(model.env, recorder, buffer, model.n_steps, *request.arguments)
        self._slots[request.slot].write(_arrays_of(buffer))
        return Collected(
            request.slot,
            version,
            waited,
            np.stack(recorder.rewards),
            None if venv is None else np.stack(recorder.original_rewards),
            recorder.infos,
            model._collection_state(),
            None if venv is None else statistics_of(venv),
        )

    def _load_parameters(self) -> int:
        with self._lock, th.no_grad():
            for name, tensor in _tensors_of(self._policy).items():
                tensor.copy_(th.from_numpy(self._parameters.arrays[name]).view(tensor.dtype))
            return int(self._numbers.arrays["version"][0])

    def _close(self) -> None:
        base = self._model.env.unwrapped
        if isinstance(base, SubprocVecEnv):
            base.closed = True  # its processes are those of the other one, which ends them
        self._model.env.close()


class _Recorder(BaseCallback):
    """
    Keeps what the buffer does not.

    :param n_steps: counts all steps
    :param parent: number of the process that trains
    :param venv: that normalises rewards, if there is one
    """

    def __init__(self, n_steps: np.ndarray, parent: int, venv: VecNormalize | None) -> None:
        super().__init__()
        self._n_steps, self._parent, self._venv = n_steps, parent, venv
        self.rewards: list[np.ndarray] = []
        self.original_rewards: list[np.ndarray] = []
        self.infos: list[Any] = []

    def _on_step(self) -> bool:
        if os.getppid() != self._parent:
            raise EOFError
        self._n_steps[0] += 1
        # Those of truncated episodes will have a value added.
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
