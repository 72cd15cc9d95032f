"""
Copies of a policy for another process: its tensors as arrays, which can lie in shared memory, and a pickle of all the
rest, which hardly ever changes.
"""

import contextlib
import io
import math
import pickle
import types
from collections.abc import Sequence
from typing import Any, NamedTuple

import cloudpickle
import numpy as np
import torch as th
from stable_baselines3.common.distributions import Distribution

from sb3_ppo_ewma.policies import uncompiled

_ALIGNMENT = 64
_OF_MINIBATCH = ("distribution", "_latent_sde")
# Kinds of persistent references in the pickle
_TENSOR, _OPTIMIZER = "tensor", "optimizer"


class PolicyCopy(NamedTuple):
    """
    A policy, without its optimiser.

    :param rest: pickle of everything but the tensors
    :param tensors: all its tensors; arrays that share the tensors' memory where they are on a CPU
    """

    rest: bytes
    tensors: list[np.ndarray]


def policy_copy(policy: th.nn.Module, by_value: bool = False) -> PolicyCopy:
    """
    :param policy: policy on any device; the copy is for a CPU
    :param by_value: whether functions and classes of the main module go by value, as the other process lacks it
    :return: what :func:`build_policy` makes it of
    :raises TypeError: if it cannot be pickled
    """
    if not by_value:
        with contextlib.suppress(Exception):  # for functions and classes that have no name
            return _pickled(policy, _Pickler)
    try:
        return _pickled(policy, _CloudPickler)
    except Exception as error:
        raise TypeError(
            "collection in another process needs a policy that can be pickled, this one cannot: "
            f"{type(error).__name__}: {error}"
        ) from error


def build_policy(rest: bytes, tensors: Sequence[np.ndarray]) -> Any:
    """
    :param rest: from :func:`policy_copy`
    :param tensors: from :func:`policy_copy`, which are copied
    :return: a policy that can be evaluated, on the CPU
    """
    return _Unpickler(rest, tensors).load()


def _pickled(policy: th.nn.Module, pickler_class: Any) -> PolicyCopy:
    file = io.BytesIO()
    pickler = pickler_class(file)
    pickler.dump(uncompiled(policy))
    return PolicyCopy(file.getvalue(), pickler.arrays)


class _TensorsApart:
    """For picklers: keeps tensors out of the pickle, and what another process neither needs nor could use."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)  # type: ignore[call-arg]
        self.arrays: list[np.ndarray] = []
        self._references: dict[int, tuple[Any, ...]] = {}
        self._tensors: list[th.Tensor] = []  # which must live as long as their ids are used

    def persistent_id(self, value: Any) -> tuple[Any, ...] | None:
        if isinstance(value, th.optim.Optimizer):
            return (_OPTIMIZER,)
        if type(value) not in (th.Tensor, th.nn.Parameter, th.nn.Buffer) or not _has_array(value):
            return None
        if id(value) not in self._references:
            self._references[id(value)] = self._reference(value)
            self._tensors.append(value)
        return self._references[id(value)]

    def _reference(self, tensor: th.Tensor) -> tuple[Any, ...]:
        plain = tensor.detach().cpu()
        self.arrays.append(_array(plain))
        is_parameter = isinstance(tensor, th.nn.Parameter)
        place = plain.data_ptr() % _ALIGNMENT, plain.stride()
        return _TENSOR, len(self.arrays) - 1, plain.dtype, place, is_parameter, tensor.requires_grad

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, types.MethodType) and not isinstance(value.__self__, type):
            # The function itself, not what its name finds in the class
            return types.MethodType, (value.__func__, value.__self__)
        if isinstance(value, Distribution):
            # These depend on the last minibatch; the next forward pass makes others.
            state = {name: None if name in _OF_MINIBATCH else each for name, each in vars(value).items()}
            return _blank, (type(value),), state
        inherited: Any = getattr(super(), "reducer_override", None)
        return NotImplemented if inherited is None else inherited(value)


class _Pickler(_TensorsApart, pickle.Pickler):
    pass


class _CloudPickler(_TensorsApart, cloudpickle.Pickler):  # type: ignore[misc]
    pass


class _Unpickler(pickle.Unpickler):
    def __init__(self, rest: bytes, arrays: Sequence[np.ndarray]) -> None:
        super().__init__(io.BytesIO(rest))
        self._arrays = arrays
        self._tensors: dict[int, th.Tensor] = {}

    def persistent_load(self, reference: tuple[Any, ...]) -> Any:
        if reference[0] == _OPTIMIZER:
            return None
        _, index, dtype, place, is_parameter, requires_grad = reference
        if index not in self._tensors:
            tensor = _empty_at(self._arrays[index].shape, dtype, *place)
            _array(tensor)[...] = self._arrays[index]  # torch refuses to copy into an expanded tensor
            self._tensors[index] = th.nn.Parameter(tensor, requires_grad) if is_parameter else tensor
        return self._tensors[index]


def _array(tensor: th.Tensor) -> np.ndarray:
    """
    :param tensor: on the CPU
    :return: an array with its memory
    """
    return (tensor.view(th.int16) if tensor.dtype == th.bfloat16 else tensor).numpy()


def _empty_at(shape: tuple[int, ...], dtype: th.dtype, address: int, stride: tuple[int, ...]) -> th.Tensor:
    """
    :param shape: shape
    :param dtype: type
    :param address: where the memory begins, modulo the width of the widest registers: sums of products are rounded in
        another order where it differs
    :param stride: steps in memory along each axis
    :return: a tensor
    """
    n_elements = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if math.prod(shape) else 0
    memory = th.empty(n_elements * dtype.itemsize + _ALIGNMENT, dtype=th.uint8)
    first = (address - memory.data_ptr()) % _ALIGNMENT
    flat = memory[first : first + n_elements * dtype.itemsize].view(dtype)
    return flat.as_strided(shape, stride, flat.storage_offset())


def _blank(cls: Any) -> Any:
    return cls.__new__(cls)


def _has_array(tensor: th.Tensor) -> bool:
    return tensor.layout == th.strided and not tensor.is_quantized and not tensor.is_meta
