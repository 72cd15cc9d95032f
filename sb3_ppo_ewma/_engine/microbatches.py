"""
Minibatches of images in parts, whose gradients are added up. Convolutions are as fast on parts; what is between them is
faster: it fits into the processor's caches, and memory of this size is used again instead of being fetched from the
system for every operation.
"""

import math
import operator
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch as th
from torch import nn

from sb3_ppo_ewma._engine.iteration import (
    AuxiliaryCoefficients,
    AuxiliaryEvaluation,
    AuxiliaryMinibatch,
    Iteration,
    Objective,
)
from sb3_ppo_ewma._engine.standard import StandardEngine
from sb3_ppo_ewma.evaluation import Evaluation

# Bytes of the largest output of a layer. Of 4, 8, 16 and 32 MiB, 8 was best for both Nature CNN and IMPALA's network.
_LARGEST_OUTPUT = 2**23


class MicrobatchEngine(StandardEngine):
    """
    The standard engine for networks that compute each sample by itself, on a CPU.

    :param iteration: what the training works with
    """

    name: ClassVar[str] = "microbatches"

    def __init__(self, iteration: Iteration) -> None:
        super().__init__(iteration)
        self._size: int | None = None

    def step(self, minibatch: Any, objective: Objective) -> bool:
        iteration = self.iteration
        coefficients, optimizer = iteration.coefficients, iteration.optimizer_of(objective)
        last_gradients = [parameter.grad for parameter in self.parameters]
        optimizer.zero_grad()
        prepared = iteration.prepare(minibatch)
        evaluations = []
        for share, part in self._parts(prepared.samples.observations, prepared):
            evaluation = self.evaluate(part, objective)
            loss, _ = self.loss(evaluation, part, objective, coefficients)
            (share * loss).backward()  # type: ignore[no-untyped-call]  # torch has no annotation here
            evaluations.append(evaluation)
        with th.no_grad():
            loss, statistics = self.loss(_joined(Evaluation, evaluations), prepared, objective, coefficients)
        if self.exceeds_max_kl(statistics):
            for parameter, gradient in zip(self.parameters, last_gradients, strict=True):
                parameter.grad = gradient  # SB3 makes none for a step it refuses
            iteration.statistics.add(statistics)
            return False
        return self.update(loss, statistics, optimizer, iteration.average if objective.policy else None)

    def auxiliary_backward(
        self, minibatch: AuxiliaryMinibatch, coefficients: AuxiliaryCoefficients
    ) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        evaluations = []
        for share, part in self._parts(minibatch.samples.observations, minibatch):
            evaluation = self.evaluate_auxiliary(part)
            loss, _ = self.auxiliary_loss(evaluation, part, coefficients)
            (share * loss).backward()  # type: ignore[no-untyped-call]  # torch has no annotation here
            evaluations.append(evaluation)
        with th.no_grad():
            return self.auxiliary_loss(_joined(AuxiliaryEvaluation, evaluations), minibatch, coefficients)

    def _parts(self, observations: Any, minibatch: Any) -> Iterator[tuple[float, Any]]:
        """
        :param observations: observations of the minibatch
        :param minibatch: named tuple of tensors and such tuples, (batch, ...) each
        :return: parts of about one size, each with its share of the samples
        """
        some = next(iter(observations.values())) if isinstance(observations, dict) else observations
        if self._size is None:
            self._size = self._measured_size(observations)
        n_samples = len(some)
        size = math.ceil(n_samples / math.ceil(n_samples / self._size))
        for start in range(0, n_samples, size):
            part = slice(start, min(start + size, n_samples))
            yield (part.stop - part.start) / n_samples, map_tensors(minibatch, operator.itemgetter(part))

    @th.no_grad()
    def _measured_size(self, observations: Any) -> int:
        """
        :param observations: at least one
        :return: number of samples whose largest layer output is as large as it may be
        """
        largest = 1

        def measure(module: nn.Module, inputs: Any, outputs: Any) -> None:
            nonlocal largest
            largest = max(largest, outputs.numel() * outputs.element_size())

        extractor = self.iteration.policy.pi_features_extractor
        handles = [module.register_forward_hook(measure) for module in extractor.modules()]
        try:
            self.standard.action_outputs(map_tensors(observations, lambda tensor: tensor[:1]))
        finally:
            for handle in handles:
                handle.remove()
        return max(1, _LARGEST_OUTPUT // largest)


def map_tensors(tensors: Any, function: Callable[[th.Tensor], th.Tensor]) -> Any:
    """
    :param tensors: a tensor, or a dictionary, list or named tuple of such; what else is in it stays
    :param function: from tensor to tensor
    :return: the same with the function's results
    """
    if isinstance(tensors, th.Tensor):
        return function(tensors)
    if isinstance(tensors, dict):
        return {key: map_tensors(each, function) for key, each in tensors.items()}
    if isinstance(tensors, list | tuple):
        mapped = [map_tensors(each, function) for each in tensors]
        return type(tensors)(*mapped) if hasattr(tensors, "_fields") else type(tensors)(mapped)
    return tensors


def _joined(kind: Any, evaluations: list[Any]) -> Any:
    """
    :param kind: class of the evaluations, a named tuple
    :param evaluations: evaluations of the parts of a minibatch
    :return: that of the minibatch, detached
    """
    columns = zip(*evaluations, strict=True)
    return kind(*(None if column[0] is None else th.cat([each.detach() for each in column]) for column in columns))
