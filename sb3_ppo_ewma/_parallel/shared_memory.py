"""Memory that the process that trains and the process that collects both read and write."""

import contextlib
import copy
import mmap
import os
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from stable_baselines3.common.buffers import RolloutBuffer

_ALIGNMENT = 64
# Where a file is memory, on Linux; it may be small, as in containers
_MEMORY_DIR = "/dev/shm"
# Windows refuses to delete a file that somebody uses, unless all have opened it in this way
_DELETED_WHEN_CLOSED = getattr(os, "O_TEMPORARY", 0)


class SharedMemory:
    """
    Rollouts, the policies that collect them, and a counter. A pickle of it, opened in another process, has the same
    memory.

    :param buffer: rollout buffer with the shapes of the rollouts
    :param tensors: arrays with the shapes of a policy's tensors
    :param n_slots: number of rollouts, and of policies, that are kept at the same time
    """

    def __init__(self, buffer: RolloutBuffer, tensors: Sequence[np.ndarray], n_slots: int) -> None:
        self.n_slots = n_slots
        self._names = _names(buffer)
        rollout, policy = self._rollout_of(buffer), {str(i): array for i, array in enumerate(tensors)}
        self._rollout_shapes, self._policy_shapes = _shapes(rollout), _shapes(policy)
        arrays = {"n_steps": np.zeros(1, np.int64)}
        for slot in range(n_slots):
            arrays |= {f"rollout/{slot}/{name}": array for name, array in rollout.items()}
            arrays |= {f"policy/{slot}/{name}": array for name, array in policy.items()}
        # By name, where each array begins, its shape and its dtype
        self._layout: dict[str, tuple[int, tuple[int, ...], np.dtype[Any]]] = {}
        size = 0
        for name, array in arrays.items():
            self._layout[name] = size, array.shape, array.dtype
            size += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        self._path = _make_file(size)
        weakref.finalize(self, _unlink, self._path)  # if an interrupt comes before unlink()
        self._map()

    def _map(self) -> None:
        descriptor = os.open(self._path, os.O_RDWR | _DELETED_WHEN_CLOSED)
        try:
            memory = mmap.mmap(descriptor, 0)
        finally:
            os.close(descriptor)
        self._arrays = {
            name: np.frombuffer(memory, dtype, int(np.prod(shape, dtype=np.int64)), offset).reshape(shape)
            for name, (offset, shape, dtype) in self._layout.items()
        }

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_arrays"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._map()

    def unlink(self) -> None:
        """To be called when the other process has opened the memory. The last process that uses it frees it."""
        _unlink(self._path)

    # ------------------------------------------------------------------ counter

    @property
    def n_steps(self) -> int:
        """
        :return: number of steps that the environments have made
        """
        return int(self._arrays["n_steps"][0])

    def count_step(self) -> None:
        """Add one to :attr:`n_steps`."""
        self._arrays["n_steps"][0] += 1

    # ------------------------------------------------------------------ policies

    def write_policy(self, version: int, tensors: Sequence[np.ndarray]) -> bool:
        """
        :param version: number of the policy
        :param tensors: its tensors
        :return: whether they have the shapes of the slots; otherwise nothing is written
        """
        arrays = {str(i): array for i, array in enumerate(tensors)}
        fits = _shapes(arrays) == self._policy_shapes
        if fits:
            for slot_array, array in zip(self.policy(version), tensors, strict=True):
                slot_array[...] = array
        return fits

    def policy(self, version: int) -> list[np.ndarray]:
        """
        :param version: number of a policy that was written, and none ``n_slots`` later
        :return: its tensors, in the shared memory
        """
        return [self._arrays[f"policy/{version % self.n_slots}/{name}"] for name, *_ in self._policy_shapes]

    # ------------------------------------------------------------------ rollouts

    def fits(self, buffer: RolloutBuffer) -> bool:
        """
        :param buffer: rollout buffer
        :return: whether its arrays have the shapes and dtypes of the slots
        """
        return _shapes(self._rollout_of(buffer)) == self._rollout_shapes

    def write_rollout(self, number: int, buffer: RolloutBuffer) -> None:
        """
        :param number: number of the rollout
        :param buffer: full rollout buffer
        """
        for slot_array, array in self._with_slot(number, buffer):
            slot_array[...] = array

    def fill_buffer(self, number: int, buffer: RolloutBuffer) -> None:
        """
        :param number: number of a rollout that was written, and none ``n_slots`` later
        :param buffer: rollout buffer, reset: gets a copy
        """
        for slot_array, array in self._with_slot(number, buffer):
            array[...] = slot_array

    def _with_slot(self, number: int, buffer: RolloutBuffer) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for name, array in self._rollout_of(buffer).items():
            yield self._arrays[f"rollout/{number % self.n_slots}/{name}"], array

    def _rollout_of(self, buffer: RolloutBuffer) -> dict[str, np.ndarray]:
        arrays = arrays_of(buffer)
        return {name: arrays[name] for name in self._names if name in arrays}


def _shapes(arrays: Mapping[str, np.ndarray]) -> list[tuple[str, tuple[int, ...], np.dtype[Any]]]:
    return [(name, each.shape, each.dtype) for name, each in arrays.items()]


def _names(buffer: RolloutBuffer) -> list[str]:
    """
    :param buffer: rollout buffer
    :return: names of its arrays, without those that a training has left, as the starts of a recurrent one's sequences
    """
    arrays, empty = arrays_of(buffer), copy.copy(buffer)
    for name in {name.partition("/")[0] for name in arrays}:
        delattr(empty, name)
    with contextlib.suppress(AttributeError):  # of a buffer that makes its arrays elsewhere
        empty.reset()
        return [name for name in arrays_of(empty) if name in arrays]
    return list(arrays)


def arrays_of(buffer: RolloutBuffer) -> dict[str, np.ndarray]:
    """
    :param buffer: rollout buffer
    :return: its arrays by attribute; those of a dictionary as "attribute/key"
    """
    found = {}
    for name, value in vars(buffer).items():
        if isinstance(value, np.ndarray):
            found[name] = value
        elif isinstance(value, dict) and all(isinstance(each, np.ndarray) for each in value.values()):
            found |= {f"{name}/{key}": each for key, each in value.items()}
    return found


def _unlink(path: str) -> None:
    with contextlib.suppress(OSError):  # Windows, which deletes the file when the last process closes it
        os.unlink(path)


def _make_file(size: int) -> str:
    """
    :param size: bytes
    :return: path of a new file, in memory if there is room
    """
    for folder in (_MEMORY_DIR, tempfile.gettempdir()):
        with contextlib.suppress(OSError):
            descriptor, path = tempfile.mkstemp(prefix="sb3-ppo-ewma-", dir=folder)
            with contextlib.ExitStack() as undo:
                undo.callback(os.unlink, path)
                with open(descriptor, "r+b") as file:
                    file.truncate(size)
                    if hasattr(os, "posix_fallocate"):
                        os.posix_fallocate(descriptor, 0, size)  # raises an error where writing would kill the process
                undo.pop_all()
                return path
    raise MemoryError(f"there is no room for {size} bytes of shared memory in {_MEMORY_DIR} or {tempfile.gettempdir()}")
