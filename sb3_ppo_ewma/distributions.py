"""Action distributions: the torch distributions behind SB3's, their parameters, and a softplus standard deviation."""

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch as th
from stable_baselines3.common.distributions import DiagGaussianDistribution
from torch import nn
from torch.distributions import Bernoulli, Categorical, Distribution, Normal
from torch.nn import functional as F

SelfSoftplus = TypeVar("SelfSoftplus", bound="SoftplusDiagGaussianDistribution")

_PARAMETERS: dict[type[Distribution], tuple[str, ...]] = {
    Categorical: ("logits",),
    Bernoulli: ("logits",),
    Normal: ("loc", "scale"),
}


class SoftplusDiagGaussianDistribution(DiagGaussianDistribution):
    """
    Gaussian with independent dimensions whose standard deviation is softplus(x) = log(1 + eˣ) of a parameter that does
    not depend on the state, instead of SB3's eˣ. It shrinks more gently from large values.

    Source: Andrychowicz et al. 2020, https://arxiv.org/abs/2006.05990, §3.2.

    :param action_dim: number of action dimensions
    """

    def proba_distribution_net(self, latent_dim: int, log_std_init: float = 0.0) -> tuple[nn.Module, nn.Parameter]:
        """
        :param latent_dim: size of the policy network's last layer
        :param log_std_init: logarithm of the initial standard deviation, as in SB3
        :return: layer of the means; x of shape (action_dim,)
        """
        mean_actions, log_std = super().proba_distribution_net(latent_dim, log_std_init)
        std = math.exp(log_std_init)
        # Inverse of softplus: log(eˢ − 1) = s + log(1 − e⁻ˢ)
        nn.init.constant_(log_std, std + math.log(-math.expm1(-std)))
        return mean_actions, log_std

    def proba_distribution(self: SelfSoftplus, mean_actions: th.Tensor, log_std: th.Tensor) -> SelfSoftplus:
        """
        :param mean_actions: (batch, action_dim)
        :param log_std: x of shape (action_dim,); SB3's name for the parameter
        :return: this distribution
        """
        self.distribution = Normal(mean_actions, F.softplus(log_std).expand_as(mean_actions))
        return self


def standard_deviation(policy: Any) -> th.Tensor:
    """
    :param policy: with a Gaussian action distribution
    :return: its standard deviations; with gSDE those of the exploration matrix, as SB3 logs them
    """
    if isinstance(policy.action_dist, SoftplusDiagGaussianDistribution):
        return F.softplus(policy.log_std)
    return th.exp(policy.log_std)


def torch_distributions(action_dist: Any, needed_by: str) -> list[Distribution]:
    """
    :param action_dist: SB3's action distribution after a forward pass
    :param needed_by: for the message
    :return: the torch distributions inside, one for each group of action dimensions
    :raises ValueError: if there is none
    """
    distributions = getattr(action_dist, "distributions", None) or getattr(action_dist, "distribution", None)
    if distributions is None:
        raise ValueError(
            f"{needed_by} needs the distribution of the actions, but the policy left none in its "
            f"{type(action_dist).__name__}"
        )
    return [distributions] if isinstance(distributions, Distribution) else list(distributions)


def distribution_parameters(distributions: Sequence[Distribution]) -> list[th.Tensor]:
    """
    :param distributions: of independent groups of action dimensions
    :return: what determines them, all of shape (batch, ...)
    :raises ValueError: for a distribution that SB3's policies do not have
    """
    return [getattr(d, name) for d in distributions for name in _PARAMETERS[_kind(d)]]


def with_parameters(like: Sequence[Distribution], parameters: Sequence[th.Tensor]) -> list[Distribution]:
    """
    Inverse of :func:`distribution_parameters`.

    :param like: distributions of the same kinds
    :param parameters: of the new ones
    :return: the new ones
    """
    remaining = iter(parameters)
    kinds: list[Any] = [_kind(d) for d in like]
    # Without validation, which would wait for an accelerator: these are parameters of distributions already.
    return [kind(**{name: next(remaining) for name in _PARAMETERS[kind]}, validate_args=False) for kind in kinds]


def _kind(distribution: Distribution) -> type[Distribution]:
    for kind in _PARAMETERS:
        if isinstance(distribution, kind):
            return kind
    known = ", ".join(kind.__name__ for kind in _PARAMETERS)
    raise ValueError(f"action distributions must be {known} or derived from one, got {type(distribution).__name__}")
