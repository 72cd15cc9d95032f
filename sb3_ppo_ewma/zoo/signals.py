"""
Ctrl-C, SIGTERM and SIGHUP end the command, with 128 and the number of the signal as the exit code. What training and
search do then is in :mod:`sb3_ppo_ewma.zoo.interruptions`.
"""

import contextlib
import errno
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
# A group of processes gets a signal as a whole. The death of another one can be noticed before this one's signal.
_SECONDS_OF_GRACE = 1.0
# What the message of a data-parallel training says if a signal ended another process of it
_STOPPED_ELSEWHERE = re.compile(r"ended with Stopped: (SIG\w+)")


class Stopped(KeyboardInterrupt):
    """A signal has come that ends the command. What handles Ctrl-C handles it alike."""


class StopSignals:
    """
    What becomes of the signals that end the command.

    :param name: of the program, for messages
    """

    # The first signal; None: there was none
    received: signal.Signals | None = None
    # Whether the agent could not be saved
    has_failed = False
    # Whether the first signal only tells training to save the run at its next step, and to stop then
    is_held = False
    # Environments to close when the agent is saved
    to_close: Any = None

    def __init__(self, name: str = "") -> None:
        self._name, self._process = name, os.getpid()
        self._n_received = 0
        # "raise": every signal raises an error. "once": the first one, then they wait. "wait": they only wait.
        self._mode: Literal["raise", "once", "wait"] = "raise"
        self._awaited = "the agent is saved"
        self.is_installed = False

    @property
    def exit_code(self) -> int:
        """
        :return: that of a process which the signal has ended
        """
        return 0 if self.received is None else 128 + self.received

    def check(self) -> None:
        """
        :raises Stopped: if a signal has come
        """
        if self.received is not None:
            raise Stopped(self.received.name)

    def caused(self, error: BaseException) -> bool:
        """
        :param error: an error
        :return: whether it is what a signal does to other processes, such as those of environments, and this process
            has it too or gets it within moments
        """
        known = (EOFError, ConnectionError, RuntimeError)
        errors = [each for each in (error, error.__cause__) if each is not None]
        if not any(isinstance(each, known) or _is_output_gone(each) for each in errors):
            return False
        elsewhere = _STOPPED_ELSEWHERE.search(str(error))
        if elsewhere and self.is_installed:
            self.received = self.received or signal.Signals[elsewhere[1]]
        with contextlib.suppress(KeyboardInterrupt):
            deadline = time.monotonic() + _SECONDS_OF_GRACE
            while self.is_installed and self.received is None and time.monotonic() < deadline:
                time.sleep(0.02)
        return self.received is not None

    # ------------------------------------------------------------------ when a signal raises an error

    @contextlib.contextmanager
    def once(self) -> Iterator[None]:
        """Within this context, the first signal raises :class:`Stopped`. Later ones, and those after it, wait."""
        self._mode = "once"
        try:
            yield
        finally:
            self._mode = "wait"

    @contextlib.contextmanager
    def waiting(self, awaited: str) -> Iterator[None]:
        """
        Within this context, signals wait.

        :param awaited: for the message, what they wait for, such as "the checkpoint is written"
        :raises Stopped: at the end, if one has come that would have raised it before
        """
        before, n_before = (self._mode, self._awaited), self._n_received
        self._mode, self._awaited = "wait", awaited
        try:
            yield
        finally:
            self._mode, self._awaited = before
        if self._n_received > n_before:
            self._raise()

    def wait(self) -> None:
        """From now on, signals wait."""
        self._mode = "wait"

    def release(self) -> None:
        """From now on, every signal raises :class:`Stopped`."""
        self._mode = "raise"

    def handle(self, number: int, frame: Any) -> None:
        """
        :param number: of the signal
        :param frame: where it came; unused
        """
        if os.getpid() != self._process:  # a copy of this process, as one with environments
            _act_by_default(number)
            return
        self.received = self.received or signal.Signals(number)
        self._n_received += 1
        if self.is_held and self._n_received == 1:
            say(f"{self._name}: {signal.Signals(number).name} waits until the run is saved, a second one does not")
            return
        self.is_held = False
        if self._mode == "wait":
            say(f"{self._name}: {signal.Signals(number).name} waits until {self._awaited}")
        else:
            self._raise()

    def _raise(self) -> None:
        if self._mode == "wait":
            return
        if self._mode == "once":
            self._mode = "wait"
        self.check()


# Those of the running command. A global, because upstream's scripts cannot pass them on.
current = StopSignals()


@contextlib.contextmanager
def stop_signals(name: str) -> Iterator[StopSignals]:
    """
    Within this context, SIGINT, SIGTERM and SIGHUP raise :class:`Stopped`, where nobody has handled or ignored them
    before (``nohup`` ignores SIGHUP). At the end, the process exits if one has come.

    :param name: of the program, for messages
    :return: what becomes of the signals
    :raises SystemExit: at the end, if a signal has come, with 128 and its number
    """
    global current
    before, current = current, StopSignals(name)
    own = current
    previous: dict[int, Any] = {}
    try:
        if threading.current_thread() is threading.main_thread():
            defaults = (signal.SIG_DFL, signal.default_int_handler)
            previous = {number: signal.getsignal(number) for number in _SIGNALS}
            previous = {number: handler for number, handler in previous.items() if handler in defaults}
            own.is_installed = bool(previous)
            for number in previous:
                signal.signal(number, own.handle)
        yield own
    except Exception as error:
        if own.has_failed or not own.caused(error):
            raise
    except (KeyboardInterrupt, SystemExit):
        if own.received is None:
            raise
    finally:
        own.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)
        current = before
    if own.received is not None:
        say(f"{name}: ended by {own.received.name}")
        _drop_output_that_is_gone()
        sys.exit(own.exit_code)


def say(text: str) -> None:
    """
    Write to the standard error, also within a handler of signals, and where nobody reads it any more.

    :param text: a line
    """
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())


def _act_by_default(number: int) -> None:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _is_output_gone(error: BaseException) -> bool:
    """
    :param error: an error
    :return: whether it may be that of a terminal that was closed
    """
    return isinstance(error, OSError) and error.errno == errno.EIO


# ---------------------------------------------------------------------- output that is gone


class _Output:
    """
    Output that may be lost: a terminal that was closed, a pipe whose reader Ctrl-C has ended.

    :param stream: text file
    :param may_be_lost: whether to go on without it
    """

    def __init__(self, stream: Any, may_be_lost: Callable[[], bool]) -> None:
        self._stream, self._may_be_lost = stream, may_be_lost

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """
        :param text: what to write
        :return: number of characters
        """
        try:
            self._stream.write(text)
        except OSError:
            if not self._may_be_lost():
                raise
        return len(text)

    def flush(self) -> None:
        """Write what is in the buffer."""
        try:
            self._stream.flush()
        except OSError:
            if not self._may_be_lost():
                raise


@contextlib.contextmanager
def output_may_be_lost(condition: Callable[[], bool]) -> Iterator[None]:
    """
    :param condition: whether to go on within the context where the standard output cannot be written
    """
    with (
        contextlib.redirect_stdout(_Output(sys.stdout, condition)),
        contextlib.redirect_stderr(_Output(sys.stderr, condition)),
    ):
        yield


def _drop_output_that_is_gone() -> None:
    # At its exit, Python writes what is left, and changes the exit code where it cannot.
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with contextlib.suppress(OSError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
