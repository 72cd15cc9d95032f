"""
Comparisons and recorders used by the battery.
"""

import io
from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import cloudpickle
import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.logger import KVWriter, Logger


def copy_parameters(model: BaseAlgorithm) -> dict[str, th.Tensor]:
    """
    :param model: a model
    :return: a copy of the state of its policy
    """
    return deepcopy(dict(model.policy.state_dict()))


def assert_same(first: Any, second: Any, path: str = "") -> None:
    """
    Nested containers of tensors, arrays and numbers are equal to the bit.

    :param first: one
    :param second: the other
    :param path: where in the containers, for the message
    """
    assert type(first) is type(second), path
    if isinstance(first, dict):
        assert list(first) == list(second), path
        for key in first:
            assert_same(first[key], second[key], f"{path}/{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), path
        for index, (a, b) in enumerate(zip(first, second, strict=True)):
            assert_same(a, b, f"{path}/{index}")
    elif isinstance(first, th.Tensor):
        assert th.equal(first, second), path
    elif isinstance(first, np.ndarray):
        assert np.array_equal(first, second), path
    else:
        assert first == second, path


def unchanged(model: BaseAlgorithm, before: dict[str, th.Tensor]) -> list[str]:
    """
    :param model: a model
    :param before: an earlier copy of its parameters
    :return: the names of the parameters that are still the same
    """
    return [name for name, value in model.policy.state_dict().items() if th.equal(value, before[name])]


def auxiliary_head(names: Iterable[str]) -> list[str]:
    """
    :param names: of parameters
    :return: those that only auxiliary phases train
    """
    return [name for name in names if name.startswith("aux_value_net.")]


def assert_trained(model: BaseAlgorithm, before: dict[str, th.Tensor], phase: bool = True) -> None:
    """
    Every parameter changed and is finite.

    :param model: a model
    :param before: an earlier copy of its parameters
    :param phase: whether there was an auxiliary phase since, if the algorithm has them
    """
    assert unchanged(model, before) == ([] if phase else auxiliary_head(before))
    assert all(th.isfinite(value).all() for value in model.policy.state_dict().values())


class RecordingWriter(KVWriter):
    """
    Keeps everything a logger writes, as pairs of step and values.
    """

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, Any]]] = []

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        self.rows.append((step, dict(key_values)))

    def close(self) -> None:
        pass


def record_log(model: BaseAlgorithm) -> list[tuple[int, dict[str, Any]]]:
    """
    Replace the logger of a model.

    :param model: a model
    :return: the pairs of step and values that it will log
    """
    writer = RecordingWriter()
    model.set_logger(Logger(folder=None, output_formats=[writer]))
    return writer.rows


class _TorchFinder(cloudpickle.Pickler):
    """
    Comes by every object that an object refers to.
    """

    def __init__(self) -> None:
        super().__init__(io.BytesIO())
        self.found: list[str] = []

    def persistent_id(self, obj: Any) -> None:
        if isinstance(obj, (th.Tensor, th.nn.Module, th.optim.Optimizer, th.Generator, th.distributions.Distribution)):
            self.found.append(type(obj).__name__)


def torch_objects(value: Any) -> list[str]:
    """
    :param value: anything that can be pickled
    :return: the types of the torch objects in it, at any depth
    """
    finder = _TorchFinder()
    finder.dump(value)
    return finder.found
