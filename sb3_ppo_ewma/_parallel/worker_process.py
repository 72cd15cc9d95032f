"""The process of a worker, seen from the process that starts it: its start, its answers, its end."""

import contextlib
import logging
import multiprocessing
import multiprocessing.util
import pickle
import queue
import signal
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import numpy as np

from sb3_ppo_ewma._arguments import warn_caller
from sb3_ppo_ewma._parallel.channel import Channel, dumps
from sb3_ppo_ewma._parallel.worker import ABANDON, CLOSE, KILL, POLL_SECONDS, STACK, STARTED, Call

# A forked process is there at once, unless it waits for a lock that a thread held; then another try helps.
_SECONDS_TO_FORK = 20
_TRIES_TO_FORK = 3
_SECONDS_TO_REACT = 3
_SECONDS_WITHOUT_WORD = 5
_SECONDS_WITHOUT_STEP = 10
_SECONDS_FOR_LOCKS = 5
_KINDS = ("rollout", "result", "stack")
_FORK = threading.Lock()
_FORK_WARNING = r"This process \(pid=\d+\) is multi-threaded, use of fork\(\)"
# Those that end programs, which may handle them
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class WorkerProcess:
    """
    A process that runs a :class:`~sb3_ppo_ewma._parallel.worker.Worker`.

    :param start_method: "fork", "spawn" or "forkserver"
    :param run: called in the process, with its end of a pipe, the other end if it is forked, and the other arguments
    :param args: further arguments
    :param timeout: seconds without an answer or a step of the environments after which the process is killed
    :raises RuntimeError: if the process cannot be started
    """

    def __init__(self, start_method: str, run: Callable[..., None], args: tuple[Any, ...], timeout: float) -> None:
        self._timeout = min(timeout, threading.TIMEOUT_MAX)
        # How many steps the environments have made
        self.progress: Callable[[], int] = int
        is_forked = start_method == "fork"
        # Whether the process lacks this one's main module, as that of a notebook, which is in no file
        self.by_value = not is_forked and not hasattr(sys.modules["__main__"], "__file__")
        for _ in range(_TRIES_TO_FORK if is_forked else 1):
            with _interruption_waits():  # or a process could be left that nobody knows
                self._start(multiprocessing.get_context(start_method), run, args, is_forked)
            try:
                # Number of environments, observation space and action space
                self.description = self.result(STARTED, _SECONDS_TO_FORK if is_forked else timeout)
                return
            except TimeoutError:
                self.kill()
        raise RuntimeError(f"The process that collects rollouts does not begin.{self._about_threads()}")

    def _start(self, context: Any, run: Callable[..., None], args: tuple[Any, ...], is_forked: bool) -> None:
        if multiprocessing.current_process().daemon:
            raise RuntimeError(
                "collection in another process (max_policy_lag, RemoteVecEnv) starts a process, which a daemonic "
                "process, as of multiprocessing.Pool, must not: use concurrent.futures.ProcessPoolExecutor instead, or "
                "max_policy_lag=None"
            )
        own, theirs = context.Pipe()
        with _ready_to_fork() if is_forked else contextlib.ExitStack() as held:
            arguments = (held, run, theirs, own, *args) if is_forked else (theirs, None, *args)
            process = context.Process(target=_run_forked if is_forked else run, args=arguments, name="collector")
            process.start()
        theirs.close()
        # Threads beside this one, if the process is a copy of this one
        self._threads = _other_threads() if is_forked else []
        self._process, self._channel = process, Channel(own)
        self._has_warned = self._has_failed = False
        self._n_calls = 0
        self._answers: dict[str, deque[Any]] = {kind: deque() for kind in _KINDS}
        self._finalize()

    def _finalize(self) -> None:
        arguments = self._process, self._channel, self._timeout
        self._finalizer = multiprocessing.util.Finalize(self, _end, args=arguments, exitpriority=100)

    @property
    def timeout(self) -> float:
        """
        :return: seconds without an answer or a step of the environments after which the process is killed
        """
        return self._timeout

    @timeout.setter
    def timeout(self, seconds: float) -> None:
        """
        :param seconds: its new value, which also counts for an end that comes later
        """
        seconds = min(seconds, threading.TIMEOUT_MAX)
        if seconds != self._timeout and self.is_alive:
            self._timeout = seconds
            self._finalizer.cancel()
            self._finalize()

    @property
    def is_alive(self) -> bool:
        """
        :return: whether the process can be used
        """
        return bool(self._finalizer.still_active())

    def send(self, kind: str, content: Any) -> None:
        """
        :param kind: of the message
        :param content: anything that can be pickled
        """
        self._channel.send((kind, content), self.by_value)

    def abandon(self, number: int) -> None:
        """
        :param number: of the first rollout that is still needed
        """
        self._channel.say(f"{ABANDON}{number}")

    def call(self, depth: int, name: str, *args: Any, **kwargs: Any) -> Any:
        """
        :param depth: 0 for the outermost wrapper, 1 for what it wraps, and so on
        :param name: name of a method of the environments
        :param args: its positional arguments
        :param kwargs: its keyword arguments
        :return: its :class:`~sb3_ppo_ewma._parallel.worker.Result`
        :raises Exception: what the method raises
        """
        self._n_calls += 1
        self.send("call", Call(self._n_calls, depth, name, dumps((args, kwargs), self.by_value)))
        return self.result(self._n_calls)

    def result(self, number: int, timeout: float | None = None) -> Any:
        """
        :param number: of the answer
        :param timeout: seconds; ``None``: as long as the environments go on stepping
        :return: the answer
        :raises TimeoutError: if it takes longer
        :raises Exception: what the process raised instead
        """
        if not self.is_alive:
            raise RuntimeError("The process of these environments has ended")
        while True:
            found, is_value, data = self._answer("result", timeout)
            if found == number:  # not that of a call before, which Ctrl+C has interrupted
                break
        content = pickle.loads(data)
        if not is_value:
            error, text = content
            raise error from _WorkerTraceback(text)
        return content

    def forget_rollouts(self) -> None:
        """Drop rollouts that have come and nobody has taken."""
        self._answers["rollout"].clear()

    def rollout(self) -> bytes | None:
        """
        :return: pickle of the next rollout; ``None`` if it was abandoned
        :raises Exception: what the process raised instead, which has ended it
        """
        answer: bytes | None = self._answer("rollout", None)
        return answer

    def _answer(self, kind: str, timeout: float | None) -> Any:
        n_steps, began = -1, time.monotonic()
        while not self._answers[kind]:
            message = self._next_message(POLL_SECONDS)
            if message is not None:
                self._take(*message)
                continue
            if not self._process.is_alive():
                self._raise_ended()
            waited = time.monotonic() - began
            if timeout is not None and waited > timeout:
                raise TimeoutError
            if n_steps != self.progress():
                n_steps, began = self.progress(), time.monotonic()
            elif timeout is None and waited > self.timeout:
                self._raise_hanging()
            elif waited > _SECONDS_WITHOUT_STEP and not self._has_warned and kind != "stack":
                self._has_warned = True
                warn_caller(f"The environments have made no step for {waited:.0f} seconds{self._where()}")
        return self._answers[kind].popleft()

    def _next_message(self, timeout: float) -> Any:
        """
        :param timeout: seconds
        :return: the next message; ``None`` if there is none
        """
        try:
            return self._channel.receive(timeout)
        except queue.Empty:
            return None
        except EOFError:
            if self.is_alive:
                self._process.join(_SECONDS_TO_REACT)
            return None

    def _take(self, kind: str, content: Any) -> None:
        if kind == "failed":
            self._has_failed = True
            error, text = content
            self.end()
            raise error from _WorkerTraceback(text)
        self._answers[kind].append(content)

    # ------------------------------------------------------------------ the end

    def _raise_ended(self) -> NoReturn:
        while (message := self._next_message(0)) is not None:  # what it said last may be the reason
            self._take(*message)
        code = self._process.exitcode
        how = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        self.kill()
        raise RuntimeError(f"The process that collects rollouts has ended ({how})")

    def _raise_hanging(self) -> NoReturn:
        where = self._where()
        self.kill()
        raise RuntimeError(
            f"The process that collects rollouts has made no step for {self.timeout:.0f} seconds "
            f"(collector_timeout){where}"
        )

    def _where(self) -> str:
        """
        :return: for messages, where the process is
        """
        self._channel.say(STACK)
        with contextlib.suppress(TimeoutError):
            return f".{self._about_threads()} It is here:\n{self._answer('stack', _SECONDS_TO_REACT)}"
        return f".{self._about_threads()}"

    def _about_threads(self) -> str:
        if not self._threads:
            return ""
        return (
            " It is a copy of this process, in which a lock stays closed that another thread held at that moment "
            f"({', '.join(self._threads)}). If that may be the reason: start it before the threads, or give the "
            "environments as functions to RemoteVecEnv(env_fns)."
        )

    def kill(self) -> None:
        """End the process at once, and those in which it has its environments."""
        self._channel.say(KILL)
        self._process.join(_SECONDS_TO_REACT)
        self._process.kill()
        self._finalizer()

    def end(self) -> None:
        """End the process when the environments have made their step and are closed."""
        self._finalizer()

    def raise_last(self) -> None:
        """
        To be called after the end.

        :raises Exception: what closing the environments has raised, if nothing was raised before
        """
        while not self._has_failed and (message := self._next_message(0)) is not None:
            self._take(*message)


def _other_threads() -> list[str]:
    own = {threading.current_thread(), threading.main_thread()}
    return [each.name for each in threading.enumerate() if each not in own and not each.name.startswith("channel-")]


@contextlib.contextmanager
def _ready_to_fork() -> Iterator[contextlib.ExitStack]:
    """
    Within this context, this thread holds locks that another one may hold often: of the global random numbers, of
    logging and of progress bars. A process that is forked here can open its copies of them, which belong to its thread.
    """
    numpys: Any = getattr(np.random.mtrand._rand, "_bit_generator", None)
    locks = [getattr(numpys, "lock", None)]
    locks += [getattr(handler(), "lock", None) for handler in getattr(logging, "_handlerList", ())]
    if "tqdm" in sys.modules:
        locks.append(getattr(sys.modules["tqdm"].tqdm.get_lock(), "th_lock", None))
    with contextlib.ExitStack() as held:
        held.enter_context(_FORK)  # other threads' forks change the filters of warnings, too
        held.enter_context(warnings.catch_warnings())
        # From Python 3.12 on, every fork beside other threads warns of the locks that they may hold. Here these are
        # held, a process that waits for another one is started again, and the error at last names the threads.
        warnings.filterwarnings("ignore", _FORK_WARNING, DeprecationWarning)
        for lock in locks:
            if lock is not None and lock.acquire(timeout=_SECONDS_FOR_LOCKS):
                held.callback(_release, lock)
        yield held


@contextlib.contextmanager
def _interruption_waits() -> Iterator[None]:
    """Within this context, Ctrl+C and other signals with a handler, which may raise an error, wait for its end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous: dict[int, Any] = {number: signal.getsignal(number) for number in _SIGNALS}
    previous = {number: handler for number, handler in previous.items() if callable(handler)}
    received: list[tuple[int, Any]] = []
    for number in previous:
        signal.signal(number, lambda number, frame: received.append((number, frame)))
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if received:
        previous[received[0][0]](*received[0])


def _release(lock: Any) -> None:
    with contextlib.suppress(RuntimeError):  # logging has opened its own in the forked process already
        lock.release()


def _run_forked(held: contextlib.ExitStack, run: Callable[..., None], *args: Any) -> None:
    held.close()
    run(*args)


def _end(process: Any, channel: Channel, timeout: float) -> None:
    """
    :param process: the process
    :param channel: this process's end of the connection
    :param timeout: seconds after which a process that hangs is killed
    """
    channel.say(CLOSE)
    process.join(min(timeout, _SECONDS_WITHOUT_WORD))
    if process.exitcode is None and timeout > _SECONDS_WITHOUT_WORD:
        warn_caller(f"Waiting for the environments to end their step, at most {timeout:.0f} seconds")
        process.join(timeout - _SECONDS_WITHOUT_WORD)
    if process.exitcode is None:
        process.kill()
        process.join()
    channel.close(_SECONDS_TO_REACT)
    process.close()


class _WorkerTraceback(Exception):  # noqa: N818  # the cause of an error, as in concurrent.futures
    def __str__(self) -> str:
        return f"\n{self.args[0]}"
