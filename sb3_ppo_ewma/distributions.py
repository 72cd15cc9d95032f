"""
Action distributions: closed forms on tensors for those of SB3, the torch distributions behind any other, and a softplus
standard deviation.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, TypeAlias, TypeVar, cast

import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    MultiCategoricalDistribution,
)
from torch import nn
from torch.distributions import Distribution, Normal
from torch.nn import functional as F

from sb3_ppo_ewma.losses import Coefficient, bernoulli_kl, categorical_kl

SelfSoftplus = TypeVar("SelfSoftplus", bound="SoftplusDiagGaussianDistribution")
Parameters: TypeAlias = list[th.Tensor]

# Packages whose masked distributions are torch's with masked logits
_MASKED = ("sb3_contrib.", "sb3_ppo_ewma.")
_LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)


def to_policy_actions(action_space: spaces.Space[Any], actions: th.Tensor) -> th.Tensor:
    """
    :param action_space: action space of the environment
    :param actions: actions as the rollout buffer stores them
    :return: the same in the form that the policy's distribution expects
    """
    if isinstance(action_space, spaces.Discrete):
        return actions.long().flatten()
    # Buffers of sb3-contrib keep integers, which Bernoulli's loss refuses.
    is_integer = isinstance(action_space, spaces.MultiBinary) and not actions.is_floating_point()
    return actions.float() if is_integer else actions


# === Closed forms ===


class ClosedForm(ABC):
    """
    An action distribution as functions of tensors, equal to SB3's distribution object up to rounding and drawing the
    same random numbers. Where SB3's are built anew for every batch, at more than the arithmetic costs, this is one
    object. :meth:`parameters`, :meth:`log_prob` and :meth:`entropy` also take n batches of one size, (n, batch, ...).
    """

    @abstractmethod
    def parameters(self, outputs: th.Tensor, log_std: th.Tensor | None) -> Parameters:
        """
        :param outputs: (batch, n_outputs) output of ``policy.action_net``
        :param log_std: ``policy.log_std``, ``None`` for distributions without it
        :return: what the other methods take
        """

    @abstractmethod
    def log_prob(self, parameters: Parameters, actions: th.Tensor) -> th.Tensor:
        """
        :param parameters: from :meth:`parameters`
        :param actions: from :func:`to_policy_actions`
        :return: (batch,)
        """

    @abstractmethod
    def entropy(self, parameters: Parameters) -> th.Tensor:
        """
        :param parameters: from :meth:`parameters`
        :return: (batch,)
        """

    @abstractmethod
    def sample(self, parameters: Parameters) -> th.Tensor:
        """
        :param parameters: from :meth:`parameters`
        :return: actions, (batch, ...)
        """

    @abstractmethod
    def mode(self, parameters: Parameters) -> th.Tensor:
        """
        :param parameters: from :meth:`parameters`
        :return: the most likely actions, (batch, ...)
        """

    @abstractmethod
    def kl(self, old: Parameters, new: Parameters) -> th.Tensor:
        """
        :param old: parameters of p
        :param new: parameters of q, with gradient
        :return: (batch,) KL(p ‖ q), summed over action dimensions
        """

    @abstractmethod
    def gradients(
        self, parameters: Parameters, actions: th.Tensor, weights: th.Tensor, entropy_weight: Coefficient | None
    ) -> tuple[th.Tensor, th.Tensor | None]:
        """
        Derivatives of Σ w·log π(a|s) + c·Σ H(π(·|s)) over the batch.

        :param parameters: from :meth:`parameters`
        :param actions: from :func:`to_policy_actions`
        :param weights: (batch,) w
        :param entropy_weight: c, ``None`` for 0
        :return: with respect to the outputs, (batch, n_outputs), and to ``log_std``, ``None`` without it
        """


class CategoricalForm(ClosedForm):
    """SB3's ``CategoricalDistribution``. Its one parameter is log p, (batch, n_actions)."""

    def parameters(self, outputs: th.Tensor, log_std: th.Tensor | None) -> Parameters:
        return [F.log_softmax(outputs, dim=-1)]

    def log_prob(self, parameters: Parameters, actions: th.Tensor) -> th.Tensor:
        (log_probs,) = parameters
        actions = actions.long()
        if actions.dim() < log_probs.dim() - 1:
            actions = actions.expand(log_probs.shape[:-1])
        return log_probs.gather(-1, actions.unsqueeze(-1)).squeeze(-1)

    def entropy(self, parameters: Parameters) -> th.Tensor:
        (log_probs,) = parameters
        # Where a probability is 0, its logarithm may be -Inf.
        finite = th.clamp(log_probs, min=th.finfo(log_probs.dtype).min)
        return -(finite * log_probs.exp()).sum(dim=-1)

    def sample(self, parameters: Parameters) -> th.Tensor:
        # What multinomial() does, without its checks: a NaN shows in the log-probabilities.
        probs = parameters[0].exp()
        return (probs / th.empty_like(probs).exponential_()).argmax(dim=-1)

    def mode(self, parameters: Parameters) -> th.Tensor:
        return th.argmax(parameters[0], dim=1)

    def kl(self, old: Parameters, new: Parameters) -> th.Tensor:
        return categorical_kl(old[0].exp(), old[0], new[0])

    def gradients(
        self, parameters: Parameters, actions: th.Tensor, weights: th.Tensor, entropy_weight: Coefficient | None
    ) -> tuple[th.Tensor, th.Tensor | None]:
        (log_probs,) = parameters
        weights = weights.unsqueeze(1)
        probs = log_probs.exp()
        # d log p(a) / d logits = onehot(a) − p
        gradient = (-weights * probs).scatter_add_(1, actions.long().unsqueeze(1), weights)
        if entropy_weight is not None:
            # dH / d logits = −p·(log p + H)
            gradient -= entropy_weight * probs * (log_probs + self.entropy(parameters).unsqueeze(1))
        return gradient, None


class MultiCategoricalForm(ClosedForm):
    """
    SB3's ``MultiCategoricalDistribution``: independent categorical variables, a parameter each.

    :param sizes: number of actions of each variable
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = [int(size) for size in sizes]
        self._one = CategoricalForm()

    def parameters(self, outputs: th.Tensor, log_std: th.Tensor | None) -> Parameters:
        return [F.log_softmax(part, dim=-1) for part in th.split(outputs, self._sizes, dim=-1)]

    def _columns(self, parameters: Parameters, actions: th.Tensor) -> list[tuple[Parameters, th.Tensor]]:
        return [([part], column) for part, column in zip(parameters, actions.unbind(dim=-1), strict=True)]

    def log_prob(self, parameters: Parameters, actions: th.Tensor) -> th.Tensor:
        return th.stack([self._one.log_prob(*each) for each in self._columns(parameters, actions)]).sum(dim=0)

    def entropy(self, parameters: Parameters) -> th.Tensor:
        return th.stack([self._one.entropy([part]) for part in parameters]).sum(dim=0)

    def sample(self, parameters: Parameters) -> th.Tensor:
        return th.stack([self._one.sample([part]) for part in parameters], dim=1)

    def mode(self, parameters: Parameters) -> th.Tensor:
        return th.stack([self._one.mode([part]) for part in parameters], dim=1)

    def kl(self, old: Parameters, new: Parameters) -> th.Tensor:
        return th.stack([self._one.kl([p], [q]) for p, q in zip(old, new, strict=True)]).sum(dim=0)

    def gradients(
        self, parameters: Parameters, actions: th.Tensor, weights: th.Tensor, entropy_weight: Coefficient | None
    ) -> tuple[th.Tensor, th.Tensor | None]:
        columns = self._columns(parameters, actions)
        return th.cat([self._one.gradients(*each, weights, entropy_weight)[0] for each in columns], dim=1), None


class BernoulliForm(ClosedForm):
    """SB3's ``BernoulliDistribution``. Its one parameter is the logits, (batch, n_actions)."""

    def parameters(self, outputs: th.Tensor, log_std: th.Tensor | None) -> Parameters:
        return [outputs]

    def log_prob(self, parameters: Parameters, actions: th.Tensor) -> th.Tensor:
        (logits,) = parameters
        if actions.dim() < logits.dim():
            actions = actions.expand(logits.shape)
        return -F.binary_cross_entropy_with_logits(logits, actions, reduction="none").sum(dim=-1)

    def entropy(self, parameters: Parameters) -> th.Tensor:
        (logits,) = parameters
        return F.binary_cross_entropy_with_logits(logits, th.sigmoid(logits), reduction="none").sum(dim=-1)

    def sample(self, parameters: Parameters) -> th.Tensor:
        return th.bernoulli(th.sigmoid(parameters[0]))

    def mode(self, parameters: Parameters) -> th.Tensor:
        return th.round(th.sigmoid(parameters[0]))

    def kl(self, old: Parameters, new: Parameters) -> th.Tensor:
        return bernoulli_kl(old[0], new[0]).sum(dim=-1)

    def gradients(
        self, parameters: Parameters, actions: th.Tensor, weights: th.Tensor, entropy_weight: Coefficient | None
    ) -> tuple[th.Tensor, th.Tensor | None]:
        (logits,) = parameters
        probs = th.sigmoid(logits)
        # d log p(a) / d logit = a − p
        gradient = weights.unsqueeze(1) * (actions - probs)
        if entropy_weight is not None:
            # dH / d logit = −logit·p·(1 − p)
            gradient -= entropy_weight * logits * probs * (1 - probs)
        return gradient, None


class GaussianForm(ClosedForm):
    """SB3's ``DiagGaussianDistribution``. Its parameters are the means, (batch, n), and standard deviations, (n,)."""

    def std(self, log_std: th.Tensor) -> th.Tensor:
        """
        :param log_std: ``policy.log_std``
        :return: standard deviations σ
        """
        return log_std.exp()

    def std_slope(self, std: th.Tensor) -> th.Tensor | float:
        """
        :param std: standard deviations σ
        :return: derivative of log σ with respect to ``log_std``
        """
        return 1.0

    def parameters(self, outputs: th.Tensor, log_std: th.Tensor | None) -> Parameters:
        if log_std is None:
            raise ValueError("log_std must be given for a Gaussian distribution, got None")
        return [outputs, self.std(log_std)]

    def log_prob(self, parameters: Parameters, actions: th.Tensor) -> th.Tensor:
        mean, std = parameters
        return -(0.5 * ((actions - mean) / std) ** 2).sum(-1) - (std.log() + _LOG_SQRT_2PI).sum(-1)

    def entropy(self, parameters: Parameters) -> th.Tensor:
        mean, std = parameters
        return (0.5 + _LOG_SQRT_2PI + std.log()).sum(-1).expand(mean.shape[:-1])

    def sample(self, parameters: Parameters) -> th.Tensor:
        mean, std = parameters
        return mean + th.empty_like(mean).normal_() * std

    def mode(self, parameters: Parameters) -> th.Tensor:
        return parameters[0]

    def kl(self, old: Parameters, new: Parameters) -> th.Tensor:
        (old_mean, old_std), (mean, std) = old, new
        ratio = old_std / std
        return (0.5 * (ratio**2 + ((old_mean - mean) / std) ** 2 - 1) - ratio.log()).sum(dim=-1)

    def gradients(
        self, parameters: Parameters, actions: th.Tensor, weights: th.Tensor, entropy_weight: Coefficient | None
    ) -> tuple[th.Tensor, th.Tensor | None]:
        mean, std = parameters
        deviations = (actions - mean) / std
        # d log p(a) / d mean = (a − mean)/σ²,  d log p(a) / d log σ = ((a − mean)/σ)² − 1,  dH / d log σ = 1
        log_std_gradient = (weights.unsqueeze(1) * (deviations**2 - 1)).sum(0)
        if entropy_weight is not None:
            log_std_gradient += entropy_weight * len(actions)
        return weights.unsqueeze(1) * deviations / std, (log_std_gradient * self.std_slope(std)).flatten()


class SoftplusGaussianForm(GaussianForm):
    """:class:`SoftplusDiagGaussianDistribution`."""

    def std(self, log_std: th.Tensor) -> th.Tensor:
        return F.softplus(log_std)

    def std_slope(self, std: th.Tensor) -> th.Tensor | float:
        return -th.expm1(-std) / std  # the derivative of softplus, the logistic function, is 1 − e^−σ


class SoftplusDiagGaussianDistribution(DiagGaussianDistribution):
    """
    Gaussian with independent dimensions whose standard deviation is softplus(x) = log(1 + eˣ) of a parameter that does
    not depend on the state, instead of SB3's eˣ. It shrinks more gently from large values.

    Source: Andrychowicz et al. 2020, https://arxiv.org/abs/2006.05990, §3.2.

    :param action_dim: number of action dimensions
    """

    closed_form: ClassVar[ClosedForm] = SoftplusGaussianForm()

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


_CLOSED_FORMS: dict[type[Any], Any] = {
    CategoricalDistribution: lambda _: CategoricalForm(),
    MultiCategoricalDistribution: lambda distribution: MultiCategoricalForm(distribution.action_dims),
    BernoulliDistribution: lambda _: BernoulliForm(),
    DiagGaussianDistribution: lambda _: GaussianForm(),
}
# Distributions with a closed form
CLOSED_FORM_DISTRIBUTIONS: tuple[type[Any], ...] = (*_CLOSED_FORMS, SoftplusDiagGaussianDistribution)


def closed_form(action_dist: Any) -> ClosedForm | None:
    """
    :param action_dist: SB3's action distribution
    :return: its closed form: that of SB3's own classes, or the class's ``closed_form``; ``None`` where there is none
    """
    make = _CLOSED_FORMS.get(type(action_dist))
    if make is not None:
        form: ClosedForm = make(action_dist)
        return form
    # Not inherited: a subclass computes something else.
    return cast(ClosedForm | None, vars(type(action_dist)).get("closed_form"))


def standard_deviation(policy: Any) -> th.Tensor:
    """
    :param policy: a policy with Gaussian actions
    :return: its standard deviations; with gSDE those of the exploration matrix, as SB3 logs them
    """
    form = closed_form(policy.action_dist)
    return form.std(policy.log_std) if isinstance(form, GaussianForm) else th.exp(policy.log_std)


# === Torch distributions ===


def torch_distributions(action_dist: Any, needed_by: str) -> list[Distribution]:
    """
    :param action_dist: SB3's action distribution after a forward pass
    :param needed_by: what needs it, for the message
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


def distribution_parameters(distributions: Sequence[Distribution]) -> Parameters:
    """
    :param distributions: independent groups of action dimensions
    :return: the tensors that determine them, (batch, ...) each
    :raises ValueError: for a distribution that is not determined by its ``arg_constraints``
    """
    return [getattr(each, name) for each in distributions for name in _parameter_names(each)]


def with_parameters(like: Sequence[Distribution], parameters: Sequence[th.Tensor]) -> list[Distribution]:
    """
    Inverse of :func:`distribution_parameters`.

    :param like: distributions of the same kinds
    :param parameters: the parameters of the new distributions
    :return: the new distributions
    """
    remaining = iter(parameters)
    # Without validation, which would wait for an accelerator: these are parameters of distributions already.
    return [
        _torch_class(each)(**{name: next(remaining) for name in _parameter_names(each)}, validate_args=False)
        for each in like
    ]


def _torch_class(distribution: Distribution) -> Any:
    for cls in type(distribution).__mro__:
        if cls.__module__.startswith("torch.distributions."):
            return cls
        if not cls.__module__.startswith(_MASKED):
            break
    raise ValueError(
        f"the distribution of the actions is a {type(distribution).__name__}, which cannot be rebuilt from its "
        "parameters: use one of torch.distributions"
    )


def _parameter_names(distribution: Distribution) -> list[str]:
    cls = _torch_class(distribution)
    constraints = vars(cls).get("arg_constraints", {})
    if not isinstance(constraints, dict) or not constraints:
        raise ValueError(
            f"the distribution {cls.__name__} of the actions does not name its parameters (arg_constraints)"
        )
    return [name for name in constraints if name != "probs" or "logits" not in constraints]
