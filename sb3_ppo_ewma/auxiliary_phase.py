"""The auxiliary phase of Phasic Policy Gradient: epochs over the samples of several rollouts."""

import math
from collections.abc import Iterator

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ProgressBarCallback

from sb3_ppo_ewma._engine.iteration import AuxiliaryCoefficients, AuxiliaryMinibatch, Engine, Iteration
from sb3_ppo_ewma.evaluation import EVALUATION_BATCH_SIZE
from sb3_ppo_ewma.rollouts import PhaseBuffer

# How often a long phase shows how far it is
_REPORTS_PER_EPOCH = 20


class PhaseProgress:
    """
    Shows at the progress bars how far a phase is. They cannot be pickled or copied: a copy shows nothing.

    :param callback: callback of the training, perhaps a list of others
    """

    def __init__(self, callback: BaseCallback | None = None) -> None:
        self._bars = [] if callback is None else list(_progress_bars(callback))

    def __reduce__(self) -> tuple[type["PhaseProgress"], tuple[()]]:
        return PhaseProgress, ()

    def show(self, epoch: int, n_epochs: int, minibatch: int, n_minibatches: int) -> None:
        """
        :param epoch: epoch of the phase, from 0
        :param n_epochs: number of epochs
        :param minibatch: minibatch of the epoch, from 0
        :param n_minibatches: number of minibatches
        """
        if minibatch * _REPORTS_PER_EPOCH % n_minibatches < _REPORTS_PER_EPOCH:
            share = 100 * minibatch // n_minibatches
            self._describe(f"aux {epoch + 1}/{n_epochs} {share}%")  # short, or the bar loses its other columns

    def clear(self) -> None:
        """Show nothing."""
        self._describe("")

    def _describe(self, text: str) -> None:
        for callback in self._bars:
            callback.pbar.set_description(text)


class AuxiliaryPhase:
    """
    One auxiliary phase.

    Source: Cobbe, Hilton, Klimov, Schulman 2020, https://arxiv.org/abs/2009.04416

    :param engine: engine that makes its gradient steps
    :param iteration: what they work with
    :param optimizer: optimiser of the phase
    :param coefficients: hyper-parameters of its loss
    :param batch_size: samples of a minibatch
    """

    def __init__(
        self,
        engine: Engine,
        iteration: Iteration,
        optimizer: th.optim.Optimizer,
        coefficients: AuxiliaryCoefficients,
        batch_size: int,
    ) -> None:
        self._engine, self._policy, self._device = engine, iteration.policy, iteration.policy.device
        self._optimizer, self._coefficients, self._batch_size = optimizer, coefficients, batch_size

    def train(self, buffer: PhaseBuffer, n_epochs: int, progress: PhaseProgress) -> None:
        """
        Train until the end, or until a step cannot be made.

        :param buffer: samples of the phase
        :param n_epochs: passes over them
        :param progress: where to show how far it is
        """
        old_parameters = self._old_parameters(buffer)
        n_minibatches = math.ceil(buffer.n_samples / buffer.whole_sequences(self._batch_size))
        try:
            for epoch in range(n_epochs):
                for i, indices in enumerate(buffer.minibatches(self._batch_size)):
                    progress.show(epoch, n_epochs, i, n_minibatches)
                    minibatch = self._minibatch(buffer, indices, old_parameters)
                    if not self._engine.auxiliary_step(minibatch, self._optimizer, self._coefficients):
                        return
                self._engine.end_epoch()
        finally:
            self._engine.synchronize()

    def _minibatch(
        self, buffer: PhaseBuffer, indices: np.ndarray, old_parameters: list[th.Tensor]
    ) -> AuxiliaryMinibatch:
        chosen = th.as_tensor(indices, device=self._device)
        samples = buffer.samples(indices, self._device)
        return AuxiliaryMinibatch(samples, [parameter[chosen] for parameter in old_parameters])

    @th.no_grad()
    def _old_parameters(self, buffer: PhaseBuffer) -> list[th.Tensor]:
        """
        :param buffer: samples of the phase
        :return: parameters of π_old for all samples, (n_samples, ...) each
        """
        self._policy.set_training_mode(False)
        blocks: list[th.Tensor] = []
        step = buffer.whole_sequences(max(self._batch_size, EVALUATION_BATCH_SIZE))
        for start in range(0, buffer.n_samples, step):
            chosen = slice(start, start + step)
            parameters = self._engine.old_parameters(buffer.samples(chosen, self._device))
            # One block each: many small ones that stay would keep the large ones between them from being used again.
            blocks = blocks or [each.new_empty((buffer.n_samples, *each.shape[1:])) for each in parameters]
            for block, parameter in zip(blocks, parameters, strict=True):
                block[chosen] = parameter
        self._policy.set_training_mode(True)
        return blocks


def _progress_bars(callback: BaseCallback) -> Iterator[ProgressBarCallback]:
    """
    :param callback: callback, perhaps a list of others
    :return: the progress bars among them
    """
    if isinstance(callback, ProgressBarCallback):
        yield callback
    elif isinstance(callback, CallbackList):
        for child in callback.callbacks:
            yield from _progress_bars(child)
