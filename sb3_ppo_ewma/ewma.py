"""
Debiased exponentially weighted moving averages: of a module's parameters (the proximal policy of PPO-EWMA) and of the
moments of a stream of batches (advantage normalisation), with the conversions between the ways to give a decay.

Source: Hilton, Cobbe, Schulman 2022, https://arxiv.org/abs/2110.00641.
"""

import contextlib
import math
from collections.abc import Callable, Iterator

import torch as th
from torch import nn


def decay_from_center_of_mass(center_of_mass: float) -> float:
    """
    β of an EWMA whose weights have their centre of mass ``center_of_mass`` updates in the past:
    1/(1−β) − 1 = c, so β = c/(1 + c).

    >>> round(decay_from_center_of_mass(8), 3)
    0.889

    :param center_of_mass: c ≥ 0, in updates
    :return: β in [0, 1)
    :raises ValueError: if it is negative or not finite
    """
    if not 0 <= center_of_mass < math.inf:
        raise ValueError(f"center_of_mass must be >= 0 and finite, got {center_of_mass}")
    return center_of_mass / (1 + center_of_mass)


def center_of_mass_from_decay(decay: float) -> float:
    """
    Inverse of :func:`decay_from_center_of_mass`: c = β/(1−β).

    :param decay: β in [0, 1)
    :return: centre of mass in updates
    :raises ValueError: if the decay is outside [0, 1)
    """
    check_decay("decay", decay)
    return decay / (1 - decay)


# The clip moves on with the average: in an iteration of n centres of mass the policy may get some n clip ranges away
# from its data. The paper has up to 3, and 5 are good too; 10 are too many, and so are 3 with data that is old already.
_FEW_EPOCHS = 5


def default_center_of_mass(n_samples: int, batch_size: int | None, n_epochs: int = 1, is_stale: bool = False) -> float:
    """
    The centre of mass that ``prox_decay="auto"`` stands for: as many gradient steps as one epoch has minibatches, as in
    the paper; with more than five epochs, half an iteration's; with stale data, an iteration's.

    >>> default_center_of_mass(256 * 256, 8192)
    8.0
    >>> default_center_of_mass(2048, 64, n_epochs=10)
    160.0

    Source: Hilton et al. 2022 for one to three epochs; for more ``ewma.md`` and ``defaults.md`` in
    ``benchmarks/experiments/results``, for stale data ``staleness.md`` there.

    :param n_samples: of a rollout
    :param batch_size: of a minibatch; ``None``: the rollout
    :param n_epochs: policy epochs per rollout
    :param is_stale: whether rollouts wait for iterations before they are trained on
    :return: ⌈n_samples/batch_size⌉, at least 1, times 1; times E/2 with more than five epochs; times E with stale data
    """
    n_minibatches = max(1, math.ceil(n_samples / (batch_size or n_samples)))
    if is_stale:
        return float(n_minibatches * n_epochs)
    return n_minibatches * (n_epochs / 2 if n_epochs > _FEW_EPOCHS else 1.0)


def decay_from_span(span: float) -> float:
    """
    Decay of an EWMA with an effective sample size ("span") of ``span`` updates: 2/(1−d) − 1 = s, so d = (s−1)/(s+1).

    :param span: s ≥ 1, in updates
    :return: d in [0, 1)
    :raises ValueError: if the span is below 1 or not finite
    """
    if not 1 <= span < math.inf:
        raise ValueError(f"span must be >= 1 and finite, got {span}")
    return (span - 1) / (span + 1)


def span_from_decay(decay: float) -> float:
    """
    Inverse of :func:`decay_from_span`: s = (1+d)/(1−d).

    :param decay: d in [0, 1)
    :return: span in updates
    :raises ValueError: if the decay is outside [0, 1)
    """
    check_decay("decay", decay)
    return (1 + decay) / (1 - decay)


def check_decay(name: str, decay: float) -> None:
    """
    :param name: of the parameter, for the message
    :param decay: its value
    :raises ValueError: if the value is outside [0, 1) or NaN
    """
    if not 0 <= decay < 1:
        raise ValueError(f"{name} must be in [0, 1), got {decay}")


class ParameterEwma(nn.Module):
    """
    Debiased EWMA θ̄ of the parameters of another module with the same architecture.

    With total weight w (w = 1 and θ̄ = θ_0 at the start), an update with decay β is::

        w' = β·w + 1,    θ̄ ← (β·w/w')·θ̄ + θ/w'

    so that θ̄ is the average of all θ seen, weighted by β^age, without a bias towards θ_0. Buffers (running statistics)
    are copied, not averaged.

    Source: Hilton et al. 2022.

    :param module: holds the average: a copy of its own of the averaged module; it is frozen and put in evaluation mode
    :param source: the averaged module, which :meth:`reset` starts from if it is not given another one
    """

    total_weight: th.Tensor

    def __init__(self, module: nn.Module, source: nn.Module | None = None) -> None:
        super().__init__()
        self._source = (source,)  # not a submodule
        self.module = module.requires_grad_(False).eval()
        self.register_buffer("total_weight", th.ones((), dtype=th.float64))
        self._pairs: Pairs | None = None

    def _apply(self, fn: Callable[[th.Tensor], th.Tensor], recurse: bool = True) -> "ParameterEwma":
        # The weight stays float64 (as float32 it would drift over long runs) and on the CPU (it is read before every
        # update; on an accelerator that would be one synchronisation per gradient step).
        weight = self.total_weight
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch has no annotation here
        self.total_weight = weight
        return self

    def update(self, source: nn.Module, decay: float) -> None:
        """
        Include the present parameters of ``source``.

        :param source: the averaged module
        :param decay: β in [0, 1]; 1 averages all updates equally
        :raises ValueError: if the decay is outside [0, 1]
        """
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must be in [0, 1], got {decay}")
        total_weight = self.total_weight
        weight = decay * total_weight.item() + 1
        pairs = self.pairs(source)
        # β·w/w' = 1 − 1/w', so the update is an interpolation by 1/w'.
        pairs.interpolate(1 / weight)
        total_weight.fill_(weight)

    def pairs(self, source: nn.Module) -> "Pairs":
        """
        :param source: the averaged module
        :return: the tensors of an update
        """
        found = self._pairs
        return found if found is not None and found.source is source else Pairs(self.module, source)

    @contextlib.contextmanager
    def updates_from(self, pairs: "Pairs") -> Iterator[None]:
        """
        Within this context, updates need not look up the tensors of both modules, which takes longer than they do.

        :param pairs: of the averaged module, whose parameters and buffers stay the same objects
        """
        self._pairs = pairs
        try:
            yield
        finally:
            self._pairs = None

    @th.no_grad()
    def reset(self, source: nn.Module | None = None) -> None:
        """
        Start again from the present parameters of ``source``: θ̄ = θ, w = 1. A copy, which also clears NaN and Inf.

        :param source: the averaged module; ``None``: the one given to the constructor
        :raises ValueError: if there is none
        """
        source = self._source[0] if source is None else source
        if source is None:
            raise ValueError("reset() needs the averaged module if the constructor was not given one")
        pairs = self.pairs(source)
        for tensor, original in zip(pairs.averages, pairs.parameters, strict=True):
            tensor.copy_(original)
        pairs.copy_buffers()
        self.total_weight.fill_(1.0)

    def parameters_loaded(self) -> None:
        """Called when the averaged module has loaded other parameters. Nothing to do: the average has its own."""


class Pairs:
    """
    The tensors of an average beside those of the averaged module: floating-point parameters, which are averaged;
    buffers and other (frozen integer) parameters, which are copied.

    :param average: holds the average
    :param source: the averaged module
    """

    def __init__(self, average: nn.Module, source: nn.Module) -> None:
        self.source = source
        self.averages, self.copies = _averaged_and_copied(average)
        self.parameters, self.originals = _averaged_and_copied(source)

    def interpolate(self, weight: float) -> None:
        """
        :param weight: of the parameters in the new average; what is not averaged is copied
        """
        averages, parameters = self.averages, self.parameters
        if th.is_grad_enabled():  # asking takes less time than entering a context without gradients
            with th.no_grad():
                self.interpolate(weight)
        elif len(averages) == 1 and not self.copies:
            averages[0].lerp_(parameters[0], weight)
        else:
            th._foreach_lerp_(averages, parameters, weight)
            self.copy_buffers()

    @th.no_grad()
    def copy_buffers(self) -> None:
        """Copy what is not averaged."""
        for copied, original in zip(self.copies, self.originals, strict=True):
            copied.copy_(original)


def _averaged_and_copied(module: nn.Module) -> tuple[list[th.Tensor], list[th.Tensor]]:
    averaged: list[th.Tensor] = []
    copied: list[th.Tensor] = list(module.buffers())
    for parameter in module.parameters():
        (averaged if parameter.is_floating_point() else copied).append(parameter)
    return averaged, copied


class MomentsEwma(nn.Module):
    """
    Debiased EWMA of mean and variance over batches: every sample of a batch of age k has weight d^k.

    Sums and sums of squares would cancel (constant samples then give a slightly negative variance), so weight, mean
    and the weighted sum of squared deviations are kept, in float64: the variance is never negative.

    :param decay: d in [0, 1); 0 remembers the last batch only
    :raises ValueError: if the decay is outside [0, 1)
    """

    weight: th.Tensor
    squared_weight: th.Tensor
    mean: th.Tensor
    squared_deviations: th.Tensor

    def __init__(self, decay: float) -> None:
        super().__init__()
        check_decay("decay", decay)
        self.decay = decay
        for name in ("weight", "squared_weight", "mean", "squared_deviations"):
            self.register_buffer(name, th.zeros((), dtype=th.float64))

    def _apply(self, fn: Callable[[th.Tensor], th.Tensor], recurse: bool = True) -> "MomentsEwma":
        return self  # four numbers, needed in float64 and on the CPU

    def update(self, samples: th.Tensor) -> None:
        """
        Include a batch.

        :param samples: any shape, at least one element
        :raises ValueError: if the batch is empty or has a NaN or Inf
        """
        samples = samples.detach().to("cpu", th.float64)
        if samples.numel() == 0 or not bool(th.isfinite(samples).all()):
            raise ValueError("samples must be finite and at least one")
        mean = samples.mean()
        self.update_from_moments(float(mean), float(((samples - mean) ** 2).mean()), samples.numel())

    def update_from_moments(self, mean: float, variance: float, count: int, ddof: int = 0) -> None:
        """
        Include a batch given by its moments.

        :param mean: of the batch
        :param variance: of the batch, its squared deviations divided by ``count − ddof``
        :param count: number of samples, at least 1
        :param ddof: 0 for the population variance, 1 for the unbiased one
        :raises ValueError: if the batch is empty or its variance negative
        """
        if count < 1 or not variance >= 0:
            raise ValueError(f"count must be >= 1 and variance >= 0, got count={count}, variance={variance}")
        old_weight = self.decay * self.weight
        self.weight.copy_(old_weight + count)
        self.squared_weight.mul_(self.decay**2).add_(count)
        delta = mean - self.mean
        share = count / self.weight
        # Chan's parallel update of the squared deviations, a sum of terms >= 0
        self.squared_deviations.mul_(self.decay).add_((count - ddof) * variance + delta**2 * old_weight * share)
        self.mean.add_(delta * share)

    def moments(self, ddof: int = 0) -> tuple[float, float]:
        """
        :param ddof: 0: population variance; 1: unbiased for weighted samples (reliability weights)
        :return: mean and variance; (0, 1) before the first update, which normalises by doing nothing
        """
        if self.weight.item() == 0:
            return 0.0, 1.0
        denominator = (self.weight - ddof * self.squared_weight / self.weight).item()
        # A single sample has no unbiased variance: 0, as its squared deviation.
        return self.mean.item(), self.squared_deviations.item() / denominator if denominator > 0 else 0.0

    def normalize(self, samples: th.Tensor) -> th.Tensor:
        """
        :param samples: any shape
        :return: (samples − mean) / (standard deviation + 1e-8), in the dtype of the samples
        """
        return standardize(samples, *self.location_and_scale())

    def location_and_scale(self) -> tuple[float, float]:
        """
        :return: what :meth:`normalize` subtracts and divides by
        """
        mean, variance = self.moments()
        return mean, math.sqrt(variance) + 1e-8

    def reset(self) -> None:
        """Forget all batches."""
        for state in (self.weight, self.squared_weight, self.mean, self.squared_deviations):
            state.zero_()


def standardize(samples: th.Tensor, location: float | th.Tensor, scale: float | th.Tensor) -> th.Tensor:
    """
    :param samples: any shape
    :param location: to subtract
    :param scale: to divide by
    :return: computed in float64, in the dtype of the samples
    """
    wide = samples if samples.device.type == "mps" else samples.double()  # mps has no float64
    return ((wide - location) / scale).to(samples.dtype)
