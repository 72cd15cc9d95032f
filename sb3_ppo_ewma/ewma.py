"""
The debiased exponentially weighted moving average of a module's parameters, from which the proximal policy of PPO-EWMA
is made, and the conversions between the ways to give a decay.

Source: Hilton, Cobbe, Schulman 2022, https://arxiv.org/abs/2110.00641.
"""

import contextlib
import math
import operator
from collections.abc import Iterator, Mapping
from typing import Any

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
MOST_CENTERS_OF_MASS = 5


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
    return n_minibatches * (n_epochs / 2 if n_epochs > MOST_CENTERS_OF_MASS else 1.0)


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


class ParameterEwma:
    """
    Debiased EWMA θ̄ of a module's floating-point parameters: a set of tensors that follows the parameters by identity.

    With total weight w (w = 1 and θ̄ = θ_0 at the start), an update with decay β is::

        w' = β·w + 1,    θ̄ ← (β·w/w')·θ̄ + θ/w'

    so that θ̄ is the average of all θ seen, weighted by β^age, without a bias towards θ_0. The averaged module is
    evaluated with θ̄ in place of θ (:meth:`in_place`): what else it consists of (running statistics, attributes, hooks,
    code) is always what the module has now.

    Source: Hilton et al. 2022.

    :param module: the module whose parameters are averaged
    """

    def __init__(self, module: nn.Module) -> None:
        self.follow(module)

    def follow(self, module: nn.Module) -> None:
        """
        Start afresh from a module: θ̄ = θ, w = 1.

        :param module: the module whose parameters are averaged from now on
        """
        self.module = module
        named = {name: each for name, each in module.named_parameters() if each.is_floating_point()}
        self.names = list(named)
        self.parameters: list[th.Tensor] = list(named.values())
        self.averages = [parameter.detach().clone() for parameter in self.parameters]
        self._known = [parameter.detach().clone() for parameter in self.parameters]
        self.total_weight = 1.0

    def follows(self, module: nn.Module) -> bool:
        """
        :param module: the averaged module
        :return: whether its parameters are the very objects that are averaged, of the same shape, dtype and device
        """
        present = [parameter for parameter in module.parameters() if parameter.is_floating_point()]
        if len(present) != len(self.parameters) or not all(map(operator.is_, present, self.parameters)):
            return False
        return all(
            (average.shape, average.dtype, average.device) == (parameter.shape, parameter.dtype, parameter.device)
            for average, parameter in zip(self.averages, self.parameters, strict=True)
        )

    def is_up_to_date(self) -> bool:
        """
        :return: whether the parameters have the values they had at the last :meth:`remember`
        """
        return all(map(th.equal, self.parameters, self._known))

    @th.no_grad()
    def remember(self) -> None:
        """Take the present values of the parameters as known: nobody else has changed them."""
        for parameter, known in zip(self.parameters, self._known, strict=True):
            if (
                known.device != parameter.device or known.shape != parameter.shape
            ):  # ``.data`` was set to another tensor
                self._known = [parameter.detach().clone() for parameter in self.parameters]
                return
        th._foreach_copy_(self._known, self.parameters)

    def parameters_loaded(self) -> None:
        """Called when parameters were loaded into the module, which is no change from outside."""
        self.remember()

    def update(self, decay: float) -> None:
        """
        Include the present parameters.

        :param decay: β in [0, 1]; 1 averages all updates equally
        :raises ValueError: if the decay is outside [0, 1]
        """
        self.interpolate(self.averages, self.parameters, decay)

    def interpolate(self, averages: list[th.Tensor], parameters: list[th.Tensor], decay: float) -> None:
        """
        The update, for other tensors that hold the same numbers.

        :param averages: θ̄
        :param parameters: θ
        :param decay: β in [0, 1]
        :raises ValueError: if the decay is outside [0, 1]
        """
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must be in [0, 1], got {decay}")
        self.total_weight = decay * self.total_weight + 1
        # β·w/w' = 1 − 1/w', so the update is an interpolation by 1/w'.
        with th.no_grad():
            th._foreach_lerp_(averages, parameters, 1 / self.total_weight)

    @th.no_grad()
    def reset(self) -> None:
        """Start again from the present parameters: θ̄ = θ, w = 1. A copy, which also clears NaN and Inf."""
        for average, parameter in zip(self.averages, self.parameters, strict=True):
            average.copy_(parameter)
        self.total_weight = 1.0
        self.remember()

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within this context, the averaged module's parameters hold θ̄. No gradient may be taken through it."""
        current = [parameter.data for parameter in self.parameters]
        try:
            for parameter, average in zip(self.parameters, self.averages, strict=True):
                parameter.data = average
            yield
        finally:
            for parameter, data in zip(self.parameters, current, strict=True):
                parameter.data = data

    def state_dict(self) -> dict[str, th.Tensor]:
        """
        :return: averages by the names of their parameters, and the total weight in float64
        """
        averages = {f"module.{name}": average for name, average in zip(self.names, self.averages, strict=True)}
        return {**averages, "total_weight": th.tensor(self.total_weight, dtype=th.float64)}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> None:
        """
        :param state_dict: from :meth:`state_dict`; entries for buffers, which older files have, are passed over
        :param strict: whether every parameter must have an average
        :raises RuntimeError: if averages are missing or their shapes differ
        :raises ValueError: if the total weight cannot be one
        """
        names = {f"module.{name}": average for name, average in zip(self.names, self.averages, strict=True)}
        missing = [name for name in (*names, "total_weight") if name not in state_dict]
        if strict and missing:
            raise RuntimeError(f"Missing key(s) in the state of the moving average: {missing}")
        for name, average in names.items():
            if name in state_dict:
                if state_dict[name].shape != average.shape:
                    raise RuntimeError(
                        f"{name} has shape {tuple(state_dict[name].shape)}, expected {tuple(average.shape)}"
                    )
                average.copy_(state_dict[name])
        if "total_weight" in state_dict:
            total_weight = float(state_dict["total_weight"])
            if not 1 <= total_weight < math.inf:
                raise ValueError(f"the loaded moving average has the total weight {total_weight}, which must be >= 1")
            self.total_weight = total_weight
        self.remember()
