"""
Collection in which environments do not wait for each other. The algorithm's own ``collect_rollouts`` runs unchanged,
row by row. What it gets as environments and as policy returns a row when the slowest environment has come to it, while
those ahead go on acting and stepping.
"""

import contextlib
import inspect
import multiprocessing.connection
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn, cast

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import StateDependentNoiseDistribution
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import (
    SubprocVecEnv,
    VecCheckNan,
    VecEnv,
    VecExtractDictObs,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
)
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn, VecEnvWrapper

# How often to look whether a process that sends nothing is still there
_POLL_SECONDS = 0.5
_SECONDS_TO_END = 5
# Wrappers that work on the environments they are given, with their attributes that have a row for each environment
_WRAPPERS: dict[type[VecEnvWrapper], tuple[str, ...]] = {
    VecCheckNan: ("_actions", "_observations"),
    VecExtractDictObs: (),
    VecFrameStack: (),  # its stacks are looked up in _states_by_env()
    VecMonitor: ("episode_returns", "episode_lengths"),
    VecNormalize: ("returns",),
    VecTransposeImage: (),
}


def read_only(arrays: Any) -> Any:
    """
    :param arrays: an array, or a dictionary of arrays
    :return: views of them that cannot be changed
    """
    if isinstance(arrays, dict):
        return {name: read_only(each) for name, each in arrays.items()}
    view = np.asarray(arrays).view()
    view.flags.writeable = False
    return view


def check_as_ready(model: Any) -> None:
    """
    :param model: an algorithm about to collect, with any ``collect``
    :raises ValueError: if ``collect="as_ready"`` and its environments cannot be stepped one by one, or a subclass
        collects in a way of its own
    """
    if model.collect != "as_ready" or model.env is None:
        return
    given, base = "collect='as_ready'", model.env.unwrapped
    if model.max_policy_lag is not None and hasattr(base, "worker_process"):
        return  # the process that has the environments knows more
    if not isinstance(base, SubprocVecEnv):
        raise ValueError(
            f"{given} needs environments in processes of their own, SubprocVecEnv or GroupedVecEnv, got "
            f"{type(base).__name__}: make them with vec_env_cls=SubprocVecEnv, or use collect='together'"
        )
    if base.closed or multiprocessing.connection.wait({process.sentinel for process in base.processes}, 0):
        raise ValueError(
            f"{given} needs environments whose processes run, these have ended: give new ones to set_env()"
        )
    for wrapper in _wrappers(model.env):
        if _known_class(wrapper) is None:
            raise ValueError(
                f"{given} cannot step {type(wrapper).__name__} for some of its environments only, it knows "
                f"{', '.join(cls.__name__ for cls in _WRAPPERS)}: wrap each environment with a gymnasium.Wrapper "
                "instead, or use collect='together'"
            )
    if not hasattr(model.policy, "_compiled_call_impl") or hasattr(model.policy, "_orig_mod"):
        raise ValueError(f"{given} cannot act with a policy compiled by torch.compile(policy): use policy.compile()")
    for cls in type(model).__mro__:
        own = vars(cls).get("collect_rollouts")
        names = None if own is None else getattr(getattr(inspect.unwrap(own), "__code__", None), "co_names", None)
        if names is not None and "_collect_here" in names:
            return  # EwmaMixin's, and those after it collect as it lets them
        if names is not None and "collect_rollouts" not in names:
            raise ValueError(
                f"{given} has no effect on {cls.__name__}.collect_rollouts(), which does not call "
                "super().collect_rollouts(): let it do so, or use collect='together'"
            )


def collect_as_ready(
    model: Any,
    collect: Callable[..., bool],
    env: VecEnv,
    callback: Any,
    rollout_buffer: Any,
    n_rollout_steps: int,
    *args: Any,
    **kwargs: Any,
) -> bool:
    """
    Collect a rollout in which each environment makes its steps at its own speed. Every sample has the action, value,
    log-probability, mask and LSTM state of the moment its environment acted.

    :param model: the algorithm
    :param collect: its ``collect_rollouts``
    :param env: the training environments
    :param callback: called row by row, when the slowest environment has made the row's step
    :param rollout_buffer: buffer to fill
    :param n_rollout_steps: number of steps of each environment
    :param args: further positional arguments of ``collect``
    :param kwargs: further keyword arguments of ``collect``
    :return: False when a callback ended the collection
    :raises ValueError: as :func:`check_as_ready`, or if ``collect`` calls the policy or steps the environments in
        another way than SB3
    :raises RuntimeError: if the process of an environment has ended, or made no step for ``collector_timeout`` seconds
    """
    check_as_ready(model)
    rows = _Rows(model, env, n_rollout_steps)
    with rows.collecting():
        view = _RowsVecEnv(env, rows), _RowCallback(callback, env, rows)
        return collect(*view, rollout_buffer, n_rollout_steps, *args, **kwargs)


# === What the algorithm's collect_rollouts() gets ===


class _RowsVecEnv(VecEnvWrapper):
    """
    The training environments, whose step returns the next complete row.

    :param venv: the training environments
    :param rows: the rollout
    """

    def __init__(self, venv: VecEnv, rows: "_Rows") -> None:
        super().__init__(venv)
        self._rows = rows

    def reset(self) -> VecEnvObs:
        raise ValueError("collect='as_ready' cannot reset the environments within a rollout")

    def step_async(self, actions: np.ndarray) -> None:
        self._rows.check_actions(actions)

    def step_wait(self) -> VecEnvStepReturn:
        return self._rows.step()

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        if method_name == "action_masks" and indices is None:
            return self._rows.masks()
        return self.venv.env_method(method_name, *args, indices=indices, **kwargs)


class _RowCallback:
    """
    The callback, during which the policy is only called by it.

    :param callback: callback of the training
    :param env: the training environments
    :param rows: the rollout
    """

    def __init__(self, callback: Any, env: VecEnv, rows: "_Rows") -> None:
        self._callback, self._env, self._rows = callback, env, rows

    def update_locals(self, variables: dict[str, Any]) -> None:
        # What later steps depend on, and others may have made already
        fixed: dict[str, Any] = {name: read_only(variables[name]) for name in ("new_obs", "dones") if name in variables}
        self._callback.update_locals({**variables, **fixed, "env": self._env, "callback": self._callback})

    def on_rollout_start(self) -> None:
        with self._rows.paused():
            self._callback.on_rollout_start()

    def on_step(self) -> Any:
        with self._rows.paused():
            return self._callback.on_step()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._callback, name)


class _StandIn:
    """
    Stands in for the ``forward`` of the policy while it collects.

    :param rows: the rollout
    :param forward: what it stands in for
    """

    stands_in_for_forward = True

    def __init__(self, rows: "_Rows", forward: Callable[..., Any]) -> None:
        self._rows, self._forward = rows, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._rows.act(args, kwargs) if self._rows.is_acting else self._forward(*args, **kwargs)


# === Environments ===


class _Pipe:
    """
    Takes the place of a pipe of ``SubprocVecEnv``, whose environment may be in the middle of a step. If something else
    is asked from it, as by a callback, the answer comes after the step, whose result is kept.

    :param index: number of the environment
    :param connection: the pipe
    :param process: process at the other end
    :param timeout: seconds after which an answer no longer comes
    """

    def __init__(self, index: int, connection: Any, process: Any, timeout: float) -> None:
        self.connection = connection
        self.is_stepping = self.is_reading = False
        self._index, self._process, self._timeout = index, process, timeout
        self._asked_at = 0.0
        self._result: list[Any] = []

    @property
    def has_result(self) -> bool:
        return bool(self._result)

    def send(self, message: Any) -> None:
        self._asked_at = time.monotonic()
        try:
            self.connection.send(message)
        except (BrokenPipeError, ConnectionResetError):
            self._raise_ended()

    def recv(self) -> Any:
        """Answer to the last message that was not a step."""
        if self.is_stepping and not self._result:
            self._result.append(self._read())
        return self._read()

    def start_step(self, message: Any) -> None:
        self.is_stepping = True
        self.send(message)

    def finish_step(self) -> Any:
        """Result of a step that has arrived."""
        result = self._result.pop() if self._result else self._take()
        self.is_stepping = False
        return result

    def check(self) -> None:
        """Raise an error if no answer is to come."""
        if multiprocessing.connection.wait([self._process.sentinel], 0) and not self.connection.poll():
            self._raise_ended()
        if time.monotonic() - self._asked_at > self._timeout:
            raise RuntimeError(
                f"Environment {self._index} has not answered for {self._timeout:g} seconds (collector_timeout)"
            )

    def _read(self) -> Any:
        while not self.connection.poll(_POLL_SECONDS):
            self.check()
        return self._take()

    def _take(self) -> Any:
        self.is_reading = True
        try:
            message = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.is_reading = False
            self._raise_ended()
        self.is_reading = False
        return message

    def _raise_ended(self) -> NoReturn:
        how = ""
        with contextlib.suppress(AssertionError):  # another process started it, as with asynchronous collection
            self._process.join(_SECONDS_TO_END)
            how = f" (exit code {self._process.exitcode})"
        raise RuntimeError(
            f"The process of environment {self._index} has ended{how}. If the environment raised an error, its "
            "traceback is in the standard error output"
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self.connection, name)


class _StepEnd(NamedTuple):
    """The steps of a :class:`_Pipe`, for SB3's ``step_async`` and ``step_wait``."""

    pipe: _Pipe

    def send(self, message: Any) -> None:
        self.pipe.start_step(message)

    def recv(self) -> Any:
        return self.pipe.finish_step()


class _Subsets:
    """
    Steps some of the environments, through the code of their own classes and wrappers.

    :param env: the training environments
    :param timeout: seconds after which an answer no longer comes
    """

    def __init__(self, env: VecEnv, timeout: float) -> None:
        base: Any = env.unwrapped
        self._env, self._base = env, base
        self._connections = base.remotes
        self.pipes = tuple(
            _Pipe(index, connection, process, timeout)
            for index, (connection, process) in enumerate(zip(base.remotes, base.processes, strict=True))
        )
        self._normalizing = [wrapper for wrapper in _wrappers(env) if isinstance(wrapper, VecNormalize)]
        self._states = [(base, "reset_infos"), *(state for each in _wrappers(env) for state in _states_by_env(each))]

    def attach(self) -> None:
        """Let whoever talks to the environments do so through :attr:`pipes`."""
        self._base.remotes = self.pipes
        for owner, name in self._states:  # rows are replaced in place, and SB3 may have returned the arrays
            if name in vars(owner):
                value = getattr(owner, name)
                setattr(owner, name, list(value) if isinstance(value, (list, tuple)) else _taken(value, slice(None)))

    def detach(self) -> None:
        """Undo :meth:`attach`."""
        self._base.remotes = self._connections

    def send(self, indices: Sequence[int], actions: np.ndarray) -> None:
        with self._only(indices):
            self._env.step_async(actions.copy())  # VecCheckNan keeps them
            self._base.waiting = False  # close() would wait for all environments

    def receive(self, indices: Sequence[int]) -> "_Stepped":
        with self._only(indices):
            observations, rewards, dones, infos = self._env.step_wait()
            originals = tuple((each.old_obs, each.old_reward) for each in self._normalizing)
        return _Stepped((observations, rewards, dones, originals), infos)

    def wait(self, is_blocking: bool = True) -> list[int]:
        """
        :param is_blocking: whether to wait until there is one
        :return: numbers of the environments whose steps can be received, in order
        """
        kept = [index for index, pipe in enumerate(self.pipes) if pipe.has_result]
        stepping = {pipe.connection: index for index, pipe in enumerate(self.pipes) if pipe.is_stepping}
        while stepping:
            timeout = _POLL_SECONDS if is_blocking and not kept else 0
            arrived = {stepping[each] for each in multiprocessing.connection.wait(list(stepping), timeout)}
            if arrived or kept or not is_blocking:
                return sorted({*arrived, *kept})
            for index in stepping.values():
                self.pipes[index].check()
        return []

    @property
    def is_closed(self) -> bool:
        return bool(self._base.closed)

    def set_originals(self, originals: Sequence[tuple[Any, np.ndarray]]) -> None:
        """
        :param originals: of each ``VecNormalize``, what its ``get_original_obs`` and ``get_original_reward`` return
        """
        for each, (observations, rewards) in zip(self._normalizing, originals, strict=True):
            each.old_obs, each.old_reward = observations, rewards

    def end(self) -> None:
        """End the processes, which nobody can talk to any more."""
        end_processes(self._base, self._connections)

    @contextlib.contextmanager
    def _only(self, indices: Sequence[int]) -> Iterator[None]:
        whole = [(owner, name, getattr(owner, name)) for owner, name in self._states if name in vars(owner)]
        self._base.remotes = tuple(_StepEnd(self.pipes[index]) for index in indices)
        for owner, name, value in whole:
            setattr(owner, name, _taken(value, indices))
        try:
            yield
        finally:
            self._base.remotes = self.pipes
            for owner, name, value in whole:
                _put(value, indices, getattr(owner, name))
                setattr(owner, name, value)


def end_processes(env: SubprocVecEnv, connections: Sequence[Any]) -> None:
    """
    End the processes of environments, whatever they are doing.

    :param env: the environments, which are then closed
    :param connections: their pipes
    """
    if env.closed:
        return
    env.closed = True
    processes: set[Any] = set(env.processes)
    for connection in connections:
        connection.close()
    for process in processes:
        process.terminate()
    sentinels = {process.sentinel: process for process in processes}
    deadline = time.monotonic() + _SECONDS_TO_END
    while sentinels and (left := deadline - time.monotonic()) > 0:
        for sentinel in multiprocessing.connection.wait(list(sentinels), left):
            del sentinels[sentinel]
    for process in sentinels.values():
        process.kill()


def _wrappers(env: Any) -> Iterator[VecEnvWrapper]:
    while isinstance(env, VecEnvWrapper):
        yield env
        env = env.venv


def _known_class(wrapper: VecEnvWrapper) -> type[VecEnvWrapper] | None:
    cls = next((cls for cls in _WRAPPERS if isinstance(wrapper, cls)), None)
    methods = ("step", "step_async", "step_wait")
    is_known = cls is not None and all(getattr(type(wrapper), name) is getattr(cls, name) for name in methods)
    return cls if is_known else None


def _states_by_env(wrapper: Any) -> list[tuple[Any, str]]:
    """
    :param wrapper: one of :data:`_WRAPPERS`
    :return: owner and name of what it keeps for each environment
    """
    if isinstance(wrapper, VecFrameStack):
        stacks: Any = wrapper.stacked_obs
        return [(each, "stacked_obs") for each in getattr(stacks, "sub_stacked_observations", {"": stacks}).values()]
    return [(wrapper, name) for cls, names in _WRAPPERS.items() if isinstance(wrapper, cls) for name in names]


def _taken(value: Any, indices: Any) -> Any:
    """
    :param value: array, list or dictionary of them, with a row for each environment
    :param indices: numbers of environments
    :return: a copy of their rows
    """
    if isinstance(value, dict):
        return {name: _taken(each, indices) for name, each in value.items()}
    return [value[index] for index in indices] if isinstance(value, list) else value[indices].copy()


def _put(value: Any, indices: Sequence[int], rows: Any) -> None:
    """
    :param value: as in :func:`_taken`, changed in place
    :param indices: numbers of environments
    :param rows: their new rows
    """
    if isinstance(value, dict):
        for name, each in value.items():
            _put(each, indices, rows[name])
    elif isinstance(value, list):
        for index, row in zip(indices, rows, strict=True):
            value[index] = row
    else:
        value[indices] = rows


# === Rows ===


class _Stepped(NamedTuple):
    """
    What environments that were received together returned.

    :param arrays: observations, rewards, dones, (batch, ...) each, and, of each ``VecNormalize``, observations and
        rewards before it
    :param infos: a list or tuple with one for each
    """

    arrays: tuple[Any, Any, Any, tuple[tuple[Any, Any], ...]]
    infos: Any


class _Acted(NamedTuple):
    """
    What the policy returned for environments that were ready together.

    :param outputs: actions, values, log-probabilities, (batch, ...) each
    :param states: LSTM states, (layers, batch, units) each; ``None`` without
    :param sent: (batch, ...) the actions as the environments get them
    :param masks: one for each; empty without
    """

    outputs: tuple[th.Tensor, ...]
    states: Any
    sent: np.ndarray
    masks: list[Any]


class _Row:
    """
    A step of all environments.

    :param n_envs: number of environments
    """

    def __init__(self, n_envs: int) -> None:
        # Of each environment: the batch that it was in, and its place in there
        self.acted: list[Any] = [None] * n_envs
        self.stepped: list[Any] = [None] * n_envs


class _Rows:
    """
    A rollout while it is collected.

    :param model: the algorithm
    :param env: the training environments
    :param n_steps: number of steps of each environment
    """

    def __init__(self, model: Any, env: VecEnv, n_steps: int) -> None:
        self._model, self._env, self._n_steps = model, env, n_steps
        self._subsets = _Subsets(env, model.collector_timeout)
        n_envs = env.num_envs
        self._rows: defaultdict[int, _Row] = defaultdict(lambda: _Row(n_envs))
        self._row = 0  # that collect_rollouts() is at
        # Numbers of steps that each environment has begun and finished
        self._n_begun, self._n_finished = np.zeros(n_envs, np.int64), np.zeros(n_envs, np.int64)
        first = _Stepped((model._last_obs, np.zeros(n_envs), model._last_episode_starts, ()), [{}] * n_envs)
        # The batch and the place in it of each environment's last step and action
        self._stepped: list[tuple[_Stepped, int]] = [(first, index) for index in range(n_envs)]
        self._acted: list[tuple[_Acted, int]] = []
        self._forward: Callable[..., Any] = model.policy._call_impl
        self._has_states = self._has_masks = False
        self._noise = _Noise(model, n_envs)
        self._is_paused = False

    # ------------------------------------------------------------------ for collect_rollouts()

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """Context of ``collect_rollouts()``. Whatever ends it, no environment is in the middle of a step afterwards."""
        policy = self._model.policy
        previous = policy._compiled_call_impl
        self._forward = previous or policy._call_impl
        self._subsets.attach()
        policy._compiled_call_impl = stand_in = _StandIn(self, self._forward)
        try:
            yield
        finally:
            if policy._compiled_call_impl is stand_in:
                policy._compiled_call_impl = previous
            try:
                self._finish()
            finally:
                self._subsets.detach()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Context in which the policy is not called to act."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    @property
    def is_acting(self) -> bool:
        """
        :return: whether a call of the policy is to act in the environments
        """
        return self._row < self._n_steps and not self._is_paused

    def act(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """
        :param args: positional arguments of the policy
        :param kwargs: keyword arguments of the policy
        :return: what the policy returned for the present row
        :raises ValueError: for arguments that no algorithm of SB3 or sb3-contrib gives
        """
        self._noise.look(self._n_begun == self._row)
        if not self._acted:
            if len(args) not in (1, 3) or kwargs.keys() - {"action_masks"}:
                raise ValueError(
                    "collect='as_ready' needs a collect_rollouts() that calls the policy with observations, LSTM "
                    f"states and episode starts, and action_masks, got {len(args)} arguments and {[*kwargs]}"
                )
            self._has_states, self._has_masks = len(args) == 3, kwargs.get("action_masks") is not None
            self._begin(list(range(self._env.num_envs)), args, kwargs)
        else:
            self._begin_row()
        places = self._rows[self._row].acted
        outputs: tuple[Any, ...] = _gathered(places, "outputs")
        return (*outputs, _gathered(places, "states", axis=1)) if self._has_states else outputs

    def masks(self) -> list[Any]:
        """
        :return: action masks of the present row
        """
        if not self._acted:
            return self._env.env_method("action_masks")
        self._begin_row()
        return [batch.masks[place] for batch, place in self._rows[self._row].acted]

    def check_actions(self, actions: np.ndarray) -> None:
        """
        :param actions: (n_envs, ...) the actions for the present row
        :raises ValueError: if the environments got others
        """
        places = self._rows[self._row].acted
        sent = None if None in places else _gathered(places, "sent")
        if sent is None or not np.array_equal(actions, sent, equal_nan=sent.dtype.kind == "f"):
            raise ValueError(
                "collect='as_ready' needs a collect_rollouts() that steps the environments with the policy's actions, "
                f"clipped or unscaled as by SB3, got {actions} where they are {sent}"
            )

    def step(self) -> VecEnvStepReturn:
        """
        :return: observations, rewards, dones and infos of the present row
        """
        while self._n_finished.min() == self._row:
            self._receive(self._subsets.wait())
            if self._n_finished.min() == self._row:
                self._begin_ready()
        places = self._rows.pop(self._row).stepped
        self._row += 1
        observations, rewards, dones, originals = _gathered(places, "arrays")
        self._subsets.set_originals(originals)
        infos = type(places[0][0].infos)([batch.infos[place] for batch, place in places])
        return observations, rewards, dones, infos

    # ------------------------------------------------------------------ the environments' own steps

    def _begin_row(self) -> None:
        """Act in the environments that have not acted in the present row, and in those that are ready with them."""
        if self._n_begun.min() == self._row:
            self._receive(self._subsets.wait(is_blocking=False))
            self._begin_ready()

    def _begin_ready(self) -> None:
        """Act in all environments whose steps have been received."""
        is_ready = (self._n_begun == self._n_finished) & (self._n_finished < self._n_steps)
        ready = np.flatnonzero(is_ready).tolist()
        if ready:
            self._begin(ready, *self._arguments(ready))

    def _arguments(self, indices: list[int]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """
        :param indices: numbers of environments that are ready
        :return: positional and keyword arguments of the policy
        """
        device, stepped = self._model.device, [self._stepped[index] for index in indices]
        args: tuple[Any, ...] = (obs_as_tensor(_gathered(stepped, "arrays", 0), device),)
        if self._has_states:
            states = _gathered([self._acted[index] for index in indices], "states", axis=1)
            starts = th.tensor(_gathered(stepped, "arrays", 2), dtype=th.float32, device=device)
            args += (states, starts)
        if not self._has_masks:
            return args, {}
        return args, {"action_masks": np.stack(self._env.env_method("action_masks", indices=indices))}

    def _begin(self, indices: list[int], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """
        Act in some environments and let them step.

        :param indices: numbers of environments that are ready
        :param args: positional arguments of the policy
        :param kwargs: keyword arguments of the policy
        """
        with th.no_grad(), self._noise.of(indices, self._n_begun, self._row):
            outputs = self._forward(*args, **kwargs)
        masks = kwargs.get("action_masks")
        sent = _for_envs(self._model, outputs[0].cpu().numpy())
        states = outputs[3] if self._has_states else None
        batch = _Acted(outputs[:3], states, sent, [] if masks is None else list(masks))
        self._subsets.send(indices, sent)
        if not self._acted:
            self._acted = [(batch, place) for place in range(len(indices))]
        for place, index in enumerate(indices):
            self._acted[index] = self._rows[int(self._n_begun[index])].acted[index] = batch, place
        self._n_begun[indices] += 1

    def _receive(self, indices: list[int]) -> None:
        """
        :param indices: numbers of environments that have made their steps
        """
        if not indices:
            return
        batch = self._subsets.receive(indices)
        for place, index in enumerate(indices):
            self._stepped[index] = self._rows[int(self._n_finished[index])].stepped[index] = batch, place
        self._n_finished[indices] += 1

    # ------------------------------------------------------------------ the end

    def _finish(self) -> None:
        """Wait for steps that go on, if the rollout was ended early, and let the next one start from there."""
        model = self._model
        if self._subsets.is_closed:
            return
        model._last_obs = None  # learn() resets the environments, unless all is known of them
        try:
            if any(pipe.is_reading for pipe in self._subsets.pipes):
                raise RuntimeError("a message was half read")
            while arrived := self._subsets.wait():
                self._receive(arrived)
        except BaseException as error:
            self._subsets.end()
            warnings.warn(f"The processes of the environments have been ended: {error!r}. Make new ones", stacklevel=2)
            return
        if not (self._n_begun == self._n_finished).all():
            return
        model._last_obs = _gathered(self._stepped, "arrays", 0)
        model._last_episode_starts = _gathered(self._stepped, "arrays", 2)
        if self._has_states:
            model._last_lstm_states = _gathered(self._acted, "states", axis=1)


def _for_envs(model: Any, actions: np.ndarray) -> np.ndarray:
    """
    :param model: the algorithm
    :param actions: (batch, ...) actions of its policy
    :return: the actions that SB3 steps environments with
    """
    space = model.action_space
    if not isinstance(space, spaces.Box):
        return actions
    if model.policy.squash_output:
        return cast(np.ndarray, model.policy.unscale_action(actions))
    return cast(np.ndarray, np.clip(actions, space.low, space.high))


class _Noise:
    """
    The exploration noise of gSDE, of which each environment has its own and, with ``sde_sample_freq``, draws it anew
    after its own steps.

    :param model: the algorithm
    :param n_envs: number of environments
    """

    def __init__(self, model: Any, n_envs: int) -> None:
        self._policy, self._n_envs, self._frequency = model.policy, n_envs, model.sde_sample_freq
        is_used = isinstance(model.policy.action_dist, StateDependentNoiseDistribution) and n_envs > 1
        self._distribution: Any = model.policy.action_dist if is_used else None
        self._drawn: th.Tensor | None = None
        self._own: Any = None

    def look(self, is_at_row: np.ndarray) -> None:
        """
        Take what ``collect_rollouts()`` has drawn since the last call.

        :param is_at_row: (n_envs,) whether environments have yet to act in its row, the others drew their own
        """
        if self._distribution is None or self._distribution.exploration_matrices is self._drawn:
            return
        self._drawn = self._distribution.exploration_matrices
        if self._own is None:
            self._own = self._drawn.clone()
        else:
            self._own[is_at_row] = self._drawn[is_at_row]

    @contextlib.contextmanager
    def of(self, indices: list[int], n_begun: np.ndarray, row: int) -> Iterator[None]:
        """
        :param indices: numbers of the environments in which the policy acts
        :param n_begun: (n_envs,) numbers of steps begun
        :param row: that ``collect_rollouts()`` is at
        :return: context in which the policy has their noise
        """
        distribution = self._distribution
        if distribution is None:
            yield
            return
        whole = distribution.exploration_mat, distribution.exploration_matrices
        ahead = [index for index in indices if n_begun[index] > row]
        drawing = [index for index in ahead if self._frequency > 0 and n_begun[index] % self._frequency == 0]
        if drawing:
            self._policy.reset_noise(len(drawing))
            self._own[drawing] = distribution.exploration_matrices
        own = self._own[indices]
        distribution.exploration_mat, distribution.exploration_matrices = own[0], own
        try:
            yield
        finally:
            distribution.exploration_mat, distribution.exploration_matrices = whole


# === Rows of several batches ===


def _gathered(places: Sequence[tuple[Any, int]], field: str, part: int | None = None, axis: int = 0) -> Any:
    """
    :param places: batches, and places in them
    :param field: attribute of the batches to read
    :param part: part of the attribute, ``None``: all
    :param axis: of the places
    :return: what was read, at the places
    """
    fields = {id(batch): getattr(batch, field) for batch, _ in places}
    parts = fields if part is None else {key: each[part] for key, each in fields.items()}
    starts, size = {}, 0
    for key, part in parts.items():
        starts[key] = size
        size += _length(part, axis)
    order = [starts[id(batch)] + place for batch, place in places]
    return _joined([*parts.values()], None if order == list(range(size)) else order, axis)


def _length(value: Any, axis: int) -> int:
    if isinstance(value, dict):
        return _length(next(iter(value.values())), axis)
    return _length(value[0], axis) if isinstance(value, tuple) else int(value.shape[axis])


def _joined(parts: list[Any], order: list[int] | None, axis: int) -> Any:
    """
    :param parts: arrays or tensors, also in dictionaries or tuples, in all of them the same
    :param order: places in all of them together; ``None``: all
    :param axis: of the places
    :return: their parts
    """
    first = parts[0]
    if isinstance(first, dict):
        return {name: _joined([each[name] for each in parts], order, axis) for name in first}
    if isinstance(first, tuple):
        joined = [_joined([each[k] for each in parts], order, axis) for k in range(len(first))]
        return type(first)(*joined) if hasattr(first, "_fields") else tuple(joined)
    if isinstance(first, th.Tensor):
        whole = first if len(parts) == 1 else th.cat(parts, axis)
        return whole if order is None else whole.index_select(axis, th.tensor(order, device=whole.device))
    array = first if len(parts) == 1 else np.concatenate(parts, axis)
    return array if order is None else array.take(order, axis)
