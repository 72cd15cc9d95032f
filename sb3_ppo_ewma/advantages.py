"""
Normalisation of advantages: per minibatch as in SB3, or over whole rollouts with a debiased moving average of their
moments.

Source: Hilton, Cobbe, Schulman 2022, https://arxiv.org/abs/2110.00641.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch as th

from sb3_ppo_ewma.ewma import check_decay
from sb3_ppo_ewma.losses import drop_padding

_EPSILON = 1e-8
_MOMENTS = ("weight", "mean", "squared_deviations")


class MomentsEwma:
    """
    Debiased EWMA of mean and variance over batches: every sample of a batch of age k has weight d^k.

    Sums and sums of squares would cancel (constant samples then give a slightly negative variance), so weight, mean
    and the weighted sum of squared deviations are kept: the variance is never negative.

    :param decay: d in [0, 1); 0 remembers the last batch only
    :raises ValueError: if the decay is outside [0, 1)
    """

    def __init__(self, decay: float) -> None:
        check_decay("decay", decay)
        self.decay = decay
        self.reset()

    def reset(self) -> None:
        """Forget all batches."""
        self.weight = self.mean = self.squared_deviations = 0.0

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

    def update_from_moments(self, mean: float, variance: float, count: int) -> None:
        """
        Include a batch given by its moments.

        :param mean: its mean
        :param variance: its population variance
        :param count: its number of samples, at least 1
        :raises ValueError: if the batch is empty or its variance negative
        """
        if count < 1 or not variance >= 0:
            raise ValueError(f"count must be >= 1 and variance >= 0, got count={count}, variance={variance}")
        old_weight = self.decay * self.weight
        self.weight = old_weight + count
        delta, share = mean - self.mean, count / self.weight
        # Chan's parallel update of the squared deviations, a sum of terms >= 0
        self.squared_deviations *= self.decay
        self.squared_deviations += count * variance + delta**2 * old_weight * share
        self.mean += delta * share

    def moments(self) -> tuple[float, float]:
        """
        :return: mean and population variance; (0, 1) before the first update, which normalises by doing nothing
        """
        return (self.mean, self.squared_deviations / self.weight) if self.weight else (0.0, 1.0)

    def location_and_scale(self) -> tuple[float, float]:
        """
        :return: what :meth:`normalize` subtracts and divides by
        """
        mean, variance = self.moments()
        return mean, math.sqrt(variance) + _EPSILON

    def normalize(self, samples: th.Tensor) -> th.Tensor:
        """
        :param samples: any shape
        :return: (samples − mean) / (standard deviation + 1e-8), in the dtype of the samples
        """
        return standardize(samples, *self.location_and_scale())

    def state_dict(self) -> dict[str, th.Tensor]:
        """
        :return: the three numbers, float64
        """
        return {name: th.tensor(getattr(self, name), dtype=th.float64) for name in _MOMENTS}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> None:
        """
        :param state_dict: from :meth:`state_dict`
        :param strict: whether all must be there
        :raises RuntimeError: if one is missing
        :raises ValueError: if one is not finite, or negative and not the mean
        """
        missing = [name for name in _MOMENTS if name not in state_dict]
        if strict and missing:
            raise RuntimeError(f"Missing key(s) in the state of the advantages' moments: {missing}")
        for name in state_dict.keys() & set(_MOMENTS):
            value = float(state_dict[name])
            if not (math.isfinite(value) and (value >= 0 or name == "mean")):
                raise ValueError(f"the loaded moments of the advantages have {name}={value}")
            setattr(self, name, value)


class AdvantageNormalizer:
    """
    Normalises the advantages of minibatches during one training.

    :param enabled: SB3's ``normalize_advantage``
    :param moments: moments over rollouts, ``None``: each minibatch by its own
    :param process_group: processes that train together, ``None``: this one trains alone
    """

    def __init__(self, enabled: bool, moments: MomentsEwma | None, process_group: Any = None) -> None:
        self.enabled, self.moments, self._process_group = enabled, moments, process_group
        self._before = moments.state_dict() if moments is not None else {}

    def include(self, advantages: np.ndarray) -> float:
        """
        Include a rollout in the moments. A rollout counts once: a second call replaces the first one's advantages.

        :param advantages: all advantages of the rollout, any shape
        :return: the standard deviation that is logged, that of the rollout where there are no moments over rollouts
        """
        if self.moments is None:
            return float(advantages.std())
        self.moments.load_state_dict(self._before)
        samples = th.as_tensor(advantages, dtype=th.float64).flatten()
        if self._process_group is None:
            self.moments.update(samples)
        else:
            mean, squares, count = self._process_group.moments(samples)
            self.moments.update_from_moments(mean.item(), squares.item() / count, count)
        return math.sqrt(self.moments.moments()[1])

    def __call__(self, advantages: th.Tensor, mask: th.Tensor | None = None) -> th.Tensor:
        """
        :param advantages: (batch,), or (n, batch) for n minibatches
        :param mask: (batch,) bool, False for padding, which does not enter the moments
        :return: the same shape
        """
        if not self.enabled:
            return advantages
        if self.moments is not None:
            return self.moments.normalize(advantages)
        if self._process_group is None:
            return normalize_advantages(advantages, mask)
        mean, squares, count = self._process_group.moments(drop_padding(advantages, mask))
        return advantages if count == 1 else standardize(advantages, mean, (squares / (count - 1)).sqrt() + _EPSILON)


def normalize_advantages(advantages: th.Tensor, mask: th.Tensor | None = None) -> th.Tensor:
    """
    Per-minibatch normalisation, as in SB3: subtract the mean, divide by the unbiased standard deviation + 1e-8.
    A single sample is returned as it is, since its standard deviation is undefined.

    :param advantages: (batch,), or (n, batch) for n minibatches
    :param mask: (batch,) bool, False for padding, which does not enter the moments
    :return: the same shape
    """
    counted = drop_padding(advantages, mask)
    if counted.shape[-1] <= 1:
        return advantages
    return (advantages - counted.mean(-1, keepdim=True)) / (counted.std(-1, keepdim=True) + _EPSILON)


def standardize(samples: th.Tensor, location: float | th.Tensor, scale: float | th.Tensor) -> th.Tensor:
    """
    :param samples: any shape
    :param location: to subtract
    :param scale: to divide by
    :return: computed in float64, in the dtype of the samples
    """
    wide = samples if samples.device.type == "mps" else samples.double()  # mps has no float64
    return ((wide - location) / scale).to(samples.dtype)
