"""Memory that the process that trains and the process that collects both read and write."""

import mmap
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer

from sb3_ppo_ewma.policies import uncompiled

_ALIGNMENT = 64


class SharedArrays:
    """
    Arrays that this process shares with the processes it forks later.

    :param like: by name, arrays with the shapes and dtypes to allocate; their values are not copied
    """

    def __init__(self, like: Mapping[str, np.ndarray]) -> None:
        offsets, size = {}, 0
        for name, array in like.items():
            offsets[name] = size
            size += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        memory = mmap.mmap(-1, max(size, 1))  # anonymous: freed with the last process that maps it
        self.arrays = {
            name: np.frombuffer(memory, array.dtype, array.size, offsets[name]).reshape(array.shape)
            for name, array in like.items()
        }

    def write(self, arrays: Mapping[str, np.ndarray]) -> None:
        """
        :param arrays: by name, the new values
        """
        for name, array in self.arrays.items():
            array[...] = arrays[name]


class SharedMemory:
    """
    Rollouts, the policy's parameters and two counters.

    :param buffer: rollout buffer with the shapes of the rollouts
    :param policy: policy with the shapes of the parameters
    :param n_slots: number of rollouts that can be kept at the same time
    :param context: multiprocessing context that forks
    """

    def __init__(self, buffer: RolloutBuffer, policy: th.nn.Module, n_slots: int, context: Any) -> None:
        template = _arrays_of(buffer)
        self._rollouts = [SharedArrays(template) for _ in range(n_slots)]
        self._parameters = SharedArrays(parameter_arrays(policy))
        self._counters = SharedArrays({"version": np.zeros(1, np.int64), "n_steps": np.zeros(1, np.int64)}).arrays
        # Held while parameters are written or read
        self.lock = context.Lock()

    @property
    def n_slots(self) -> int:
        """
        :return: number of rollouts that can be kept at the same time
        """
        return len(self._rollouts)

    @property
    def n_steps(self) -> int:
        """
        :return: number of steps that the environments have made
        """
        return int(self._counters["n_steps"][0])

    def count_step(self) -> None:
        """Add one to :attr:`n_steps`."""
        self._counters["n_steps"][0] += 1

    def write_parameters(self, arrays: Mapping[str, np.ndarray], version: int) -> None:
        """
        The caller holds the lock.

        :param arrays: from :func:`parameter_arrays`
        :param version: number of updates that the parameters have had
        """
        self._parameters.write(arrays)
        self._counters["version"][0] = version

    def read_parameters(self, policy: th.nn.Module) -> int:
        """
        :param policy: policy that gets the parameters written last
        :return: number of updates that they have had
        """
        with self.lock, th.no_grad():
            for name, tensor in _tensors_of(policy).items():
                tensor.copy_(th.from_numpy(self._parameters.arrays[name]).view(tensor.dtype))
            return int(self._counters["version"][0])

    def write_rollout(self, slot: int, buffer: RolloutBuffer) -> None:
        """
        :param slot: number of the slot to write to
        :param buffer: full rollout buffer
        """
        self._rollouts[slot].write(_arrays_of(buffer))

    def fill_buffer(self, buffer: Any, slot: int) -> None:
        """
        :param buffer: rollout buffer, which uses the arrays of the slot itself, until the slot is written again
        :param slot: number of a slot with a rollout
        """
        buffer.reset()
        for name, array in self._rollouts[slot].arrays.items():
            attribute, _, key = name.partition("/")
            if key:
                getattr(buffer, attribute)[key] = array
            else:
                setattr(buffer, attribute, array)
        buffer.pos, buffer.full = buffer.buffer_size, True


def parameter_arrays(policy: th.nn.Module) -> dict[str, np.ndarray]:
    """
    :param policy: policy on any device
    :return: by name, its parameters and buffers; bfloat16, which numpy lacks, as int16
    """
    return {name: _as_array(tensor) for name, tensor in _tensors_of(policy).items()}


def _tensors_of(policy: th.nn.Module) -> dict[str, th.Tensor]:
    module = uncompiled(policy)
    return {name: each.detach() for name, each in (*module.named_parameters(), *module.named_buffers())}


def _as_array(tensor: th.Tensor) -> np.ndarray:
    tensor = tensor.cpu().contiguous()
    array: np.ndarray = (tensor.view(th.int16) if tensor.dtype == th.bfloat16 else tensor).numpy()
    return array


def _arrays_of(buffer: RolloutBuffer) -> dict[str, np.ndarray]:
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
