"""Messages between two processes. Threads send and receive them whole, whatever interrupts the process meanwhile."""

import contextlib
import pickle
import queue
import threading
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import cloudpickle

# What ends a connection: the other process has ended, or this one has closed its end
_ENDS = (EOFError, OSError)
# How words begin, as no pickle does
_WORD = b"word "


class Channel:
    """
    One end of a connection. Sending never waits for the other process, so neither can wait for the other's reading; a
    message is never left half read, so an interrupted process can go on with the next.

    :param connection: this process's end of a duplex pipe
    :param hear: called with this channel and every word of the other process, at once and in another thread; with an
        empty word when the other end is gone. Returns whether nothing more is to be received
    """

    def __init__(
        self, connection: "Connection[Any, Any]", hear: "Callable[[Channel, str], bool] | None" = None
    ) -> None:
        self._connection = connection
        self._received: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._to_send: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        arguments = (connection, self._received, None if hear is None else partial(hear, self))
        self._threads = [
            threading.Thread(target=_receive_all, args=arguments, name="channel-receives", daemon=True),
            threading.Thread(target=_send_all, args=(connection, self._to_send), name="channel-sends", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def send(self, message: Any, by_value: bool = False) -> None:
        """
        :param message: anything that can be pickled; if the other end is gone, it is dropped
        :param by_value: as for :func:`dumps`
        :raises TypeError: if the message cannot be pickled
        """
        self._to_send.put(dumps(message, by_value))

    def say(self, word: str) -> None:
        """
        :param word: reaches the other process even while it does not receive messages
        """
        self._to_send.put(_WORD + word.encode())

    def receive(self, timeout: float) -> Any:
        """
        :param timeout: seconds
        :return: the next message
        :raises queue.Empty: if there was none in that time
        :raises EOFError: if there will be none any more
        """
        data = self._received.get(timeout=timeout) if timeout > 0 else self._received.get_nowait()
        if data is None:
            self._received.put(None)  # for the next call
            raise EOFError
        return pickle.loads(data)

    def flush(self, timeout: float) -> None:
        """
        Send what is still to be sent, and nothing more.

        :param timeout: seconds
        """
        self._to_send.put(None)
        self._threads[1].join(timeout)

    def close(self, timeout: float) -> None:
        """
        Close this end. To be called when the other process has ended, which ends the thread that receives.

        :param timeout: seconds
        """
        self._to_send.put(None)
        for thread in self._threads:
            thread.join(timeout)
        self._connection.close()


def dumps(value: Any, by_value: bool = False) -> bytes:
    """
    :param value: anything
    :param by_value: whether functions and classes of the main module go by value, as the other process lacks it
    :return: its pickle: functions and classes by name where possible, else by value
    :raises TypeError: if it cannot be pickled
    """
    if not by_value:
        with contextlib.suppress(Exception):
            return pickle.dumps(value)
    try:
        return bytes(cloudpickle.dumps(value))
    except Exception as error:
        raise TypeError(f"{type(error).__name__}: {error}") from error


def _receive_all(
    connection: "Connection[Any, Any]",
    received: "queue.SimpleQueue[bytes | None]",
    hear: Callable[[str], bool] | None,
) -> None:
    with contextlib.suppress(*_ENDS):
        while True:
            data = connection.recv_bytes()
            if hear is None or not data.startswith(_WORD):
                received.put(data)
            elif hear(data[len(_WORD) :].decode()):
                received.put(None)
    if hear is not None:
        hear("")
    received.put(None)


def _send_all(connection: "Connection[Any, Any]", to_send: "queue.SimpleQueue[bytes | None]") -> None:
    with contextlib.suppress(*_ENDS):
        while (data := to_send.get()) is not None:
            connection.send_bytes(data)
