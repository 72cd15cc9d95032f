"""
Losses of PPO with decoupled proximal and behaviour policies, as pure functions on tensors.

Symbols of the paper (Hilton, Cobbe, Schulman 2022, https://arxiv.org/abs/2110.00641) and their names here: π_θ
``log_prob``, π_prox ``log_prob_prox``, π_behav ``log_prob_behav``, Â ``advantages``, ε ``clip_range``, β ``kl_coef``.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import torch as th
from torch.autograd.function import once_differentiable
from torch.distributions import Bernoulli, Categorical, Distribution, kl_divergence
from torch.nn import functional as F

# exp() of more than this is taken as exp() of this. Below, nothing changes; above, float32 would soon overflow
# (at 88) and a gradient through an overflowed branch that min() did not choose would be 0 * Inf = NaN.
_MAX_EXPONENT = {th.float64: 300.0, th.float32: 40.0, th.bfloat16: 40.0, th.float16: 5.0}
# Log-ratios are squared for the sample estimate of the KL divergence: their squares must not overflow either.
_MAX_LOG_RATIO = {th.float64: 1e120, th.float32: 1e15, th.bfloat16: 1e15, th.float16: 100.0}


# A number, or a tensor of shape () where a compiled graph must not depend on its value
Coefficient: TypeAlias = float | th.Tensor


class PolicyLossStats(NamedTuple):
    """
    Detached statistics of one minibatch, all of shape ().

    :param policy_gradient_loss: the surrogate objective without the KL penalty
    :param kl_loss: the KL penalty, already weighted by ``kl_coef``
    :param clip_fraction: share of samples whose π_θ/π_prox lies outside [1 − ε, 1 + ε]; 0 when the clip is off
    :param approx_kl_prox: ½·mean((log π_θ − log π_prox)²)
    :param importance_ratio_max: largest π_θ/π_behav, before the cap
    :param importance_cap_fraction: share of samples whose π_θ/π_behav exceeds the cap; 0 when there is none
    :param importance_ess: effective sample size of the weights w = π_θ/π_behav, (Σw)²/(n·Σw²), before the cap
    """

    policy_gradient_loss: th.Tensor
    kl_loss: th.Tensor
    clip_fraction: th.Tensor
    approx_kl_prox: th.Tensor
    importance_ratio_max: th.Tensor
    importance_cap_fraction: th.Tensor
    importance_ess: th.Tensor


class RatioLimits(NamedTuple):
    """
    Limits of probability ratios, in log space; ``None``: no limit.

    :param low: log(1 − ε)
    :param high: log(1 + ε)
    :param log_cap: log M
    """

    low: Coefficient | None
    high: Coefficient | None
    log_cap: Coefficient | None

    @classmethod
    def of(cls, clip_range: float | None, max_importance_ratio: float | None) -> "RatioLimits":
        """
        :param clip_range: ε in [0, 1), or ``None`` for no clip
        :param max_importance_ratio: M ≥ 1, or ``None`` for no cap
        :return: the limits
        """
        low, high = (None, None) if clip_range is None else (math.log(1 - clip_range), math.log(1 + clip_range))
        log_cap = None if max_importance_ratio is None else math.log(max_importance_ratio)
        return cls(low, high, log_cap)


class Coefficients(NamedTuple):
    """
    Values of schedules and coefficients in one iteration. ``None``: that term, limit or average is off.

    :param ratio_limits: clip range and importance-ratio cap
    :param clip_range_vf: in units of the return
    :param ent_coef: weight of the entropy
    :param vf_coef: weight of the value loss
    :param kl_coef: weight of the KL penalty
    :param advantage_scale: location and scale that advantages are normalised with, ``None``: those of the minibatch
    """

    ratio_limits: RatioLimits
    clip_range_vf: Coefficient | None
    ent_coef: Coefficient | None
    vf_coef: Coefficient
    kl_coef: Coefficient | None
    advantage_scale: tuple[Coefficient, Coefficient] | None

    def as_tensors(self, device: th.device) -> "Coefficients":
        """
        :param device: of the tensors
        :return: the same with tensors in place of the numbers
        """

        def convert(value: Any) -> Any:
            if isinstance(value, tuple):
                converted = [convert(part) for part in value]
                return type(value)(*converted) if hasattr(value, "_fields") else tuple(converted)
            return None if value is None else th.tensor(value, dtype=dtype, device=device)

        dtype = th.float32 if device.type == "mps" else th.float64
        return cast(Coefficients, convert(self))


class PolicyLossTerms(NamedTuple):
    """
    A policy loss with its derivative, without a graph. The losses are means of rows, and can be left for later, when
    the rows of many minibatches are there.

    :param objective: (batch,) terms of the surrogate objective, to be maximised; without padding
    :param penalty: (batch,) terms of the weighted sample estimate of the KL penalty, ``None``: no penalty; without
        padding
    :param gradient: (batch,) derivative of the loss with respect to log π_θ
    :param log_ratio_prox: (batch,) log(π_θ/π_prox)
    :param log_ratio_behav: (batch,) log(π_θ/π_behav), before the cap
    """

    objective: th.Tensor
    penalty: th.Tensor | None
    gradient: th.Tensor
    log_ratio_prox: th.Tensor
    log_ratio_behav: th.Tensor

    @property
    def policy_gradient_loss(self) -> th.Tensor:
        """
        :return: shape (), the surrogate objective without the KL penalty
        """
        return -self.objective.mean()

    @property
    def kl_loss(self) -> th.Tensor:
        """
        :return: shape (), the KL penalty
        """
        return self.objective.new_zeros(()) if self.penalty is None else self.penalty.mean()


class RatioStatistics(NamedTuple):
    """See :class:`PolicyLossStats` for the meaning of each."""

    clip_fraction: th.Tensor
    approx_kl_prox: th.Tensor
    importance_ratio_max: th.Tensor
    importance_cap_fraction: th.Tensor
    importance_ess: th.Tensor


class LossTerms(NamedTuple):
    """
    What the gradient of one minibatch is made of.

    :param roots: tensors with a graph
    :param gradients: of the loss with respect to each of them
    :param loss: shape (), without a graph, or another number that is finite where it is
    :param statistics: by name, detached; terms of shape () and rows without padding, (batch,)
    :param parameter_gradients: of the loss with respect to all parameters, where there is no graph
    """

    roots: list[th.Tensor]
    gradients: list[th.Tensor]
    loss: th.Tensor
    statistics: dict[str, th.Tensor]
    parameter_gradients: list[th.Tensor] | None = None

    def trained(self) -> tuple[list[th.Tensor], list[th.Tensor]]:
        """
        :return: roots and gradients without those of frozen networks, if not all are
        """
        trained = [index for index, root in enumerate(self.roots) if root.requires_grad]
        indices = trained or range(len(self.roots))
        return [self.roots[index] for index in indices], [self.gradients[index] for index in indices]


class AuxiliaryLossStats(NamedTuple):
    """
    Detached terms of the auxiliary loss of one minibatch without their coefficients, all of shape ().

    :param policy_kl: E[KL(π_old ‖ π_θ)]
    :param value_loss: ½·E[(V − V_targ)²]
    :param aux_value_loss: ½·E[(V_aux − V_targ)²]
    """

    policy_kl: th.Tensor
    value_loss: th.Tensor
    aux_value_loss: th.Tensor


def masked_mean(values: th.Tensor, mask: th.Tensor | None = None) -> th.Tensor:
    """
    Mean over the entries that count.

    :param values: (batch,)
    :param mask: (batch,) bool, False for padding; ``None``: all entries count
    :return: shape ()
    """
    return valid(values, mask).mean()


def valid(values: th.Tensor, mask: th.Tensor | None) -> th.Tensor:
    """
    :param values: (batch,)
    :param mask: (batch,) bool, False for padding; ``None``: all entries count
    :return: those that count
    """
    return values if mask is None else values[mask]


def normalize_advantages(advantages: th.Tensor, mask: th.Tensor | None = None) -> th.Tensor:
    """
    Per-minibatch normalisation, as in SB3: subtract the mean, divide by the unbiased standard deviation + 1e-8.
    A single sample is returned as it is, since its standard deviation is undefined.

    :param advantages: (batch,), or (n, batch) for n minibatches
    :param mask: (batch,) bool, False for padding, which does not enter the moments
    :return: the same shape
    """
    counted = valid(advantages, mask)
    if counted.shape[-1] <= 1:
        return advantages
    return (advantages - counted.mean(-1, keepdim=True)) / (counted.std(-1, keepdim=True) + 1e-8)


def decoupled_policy_loss(
    log_prob: th.Tensor,
    log_prob_prox: th.Tensor,
    log_prob_behav: th.Tensor,
    advantages: th.Tensor,
    *,
    clip_range: float | None = 0.2,
    kl_coef: float = 0.0,
    kl: th.Tensor | None = None,
    max_importance_ratio: float | None = 100.0,
    mask: th.Tensor | None = None,
) -> tuple[th.Tensor, PolicyLossStats]:
    """
    Decoupled policy objective, to be minimised::

        clip:     −E[ (π_prox/π_behav) · min(r·Â, clip(r, 1−ε, 1+ε)·Â) ],   r = π_θ/π_prox
        penalty:  −E[ (π_θ/π_behav) · Â ] + β·KL

    With both on, the clipped objective and the penalty are added; with π_prox = π_behav they are PPO's.
    The importance-ratio cap M replaces log π_behav by max(log π_behav, log π_θ − log M), without gradient, so that a
    capped sample keeps a bounded gradient. Everything stays in log space until the last exp(), whose argument is
    limited to 40 in float32 and 300 in float64: loss and gradients are finite for any finite log-probabilities.

    It can be differentiated once.

    Source: Hilton et al. 2022; cap and sample estimate of the KL as in its released code.

    :param log_prob: (batch,) log π_θ(a|s), with gradient
    :param log_prob_prox: (batch,) log π_prox(a|s)
    :param log_prob_behav: (batch,) log π_behav(a|s)
    :param advantages: (batch,) normalised as wanted
    :param clip_range: ε in [0, 1), or ``None`` for no clip
    :param kl_coef: β ≥ 0
    :param kl: (batch,) KL(π_prox ‖ π_θ) per state with gradient; ``None``: the sample estimate ½(log π_θ − log π_prox)²
    :param max_importance_ratio: M ≥ 1, or ``None`` for no cap
    :param mask: (batch,) bool, False for padding
    :return: loss of shape (), statistics
    :raises ValueError: if shapes differ or a coefficient is out of its range
    """
    _check_shapes(
        log_prob, log_prob_prox=log_prob_prox, log_prob_behav=log_prob_behav, advantages=advantages, kl=kl, mask=mask
    )
    _check_coefficients(clip_range, kl_coef, max_importance_ratio)
    limits = RatioLimits.of(clip_range, max_importance_ratio)
    terms = policy_loss_terms(
        log_prob.detach(),
        log_prob_prox.detach(),
        log_prob_behav.detach(),
        advantages.detach(),
        limits,
        kl_coef=kl_coef if kl_coef > 0 and kl is None else None,
        mask=mask,
    )
    kl_loss = terms.kl_loss
    loss: th.Tensor = _WithGradient.apply(  # type: ignore[no-untyped-call]  # torch has no annotation here
        log_prob, terms.policy_gradient_loss + kl_loss, terms.gradient
    )
    if kl_coef > 0 and kl is not None:
        penalty = kl_coef * masked_mean(kl, mask)
        loss, kl_loss = loss + penalty, penalty.detach()
    ratios = ratio_statistics(valid(terms.log_ratio_prox, mask), valid(terms.log_ratio_behav, mask), limits)
    stats = PolicyLossStats(
        terms.policy_gradient_loss,
        kl_loss,
        ratios.clip_fraction,
        ratios.approx_kl_prox,
        ratios.importance_ratio_max,
        ratios.importance_cap_fraction,
        ratios.importance_ess,
    )
    return loss, stats


def policy_loss_terms(
    log_prob: th.Tensor,
    log_prob_prox: th.Tensor,
    log_prob_behav: th.Tensor,
    advantages: th.Tensor,
    limits: RatioLimits,
    *,
    kl_coef: Coefficient | None = None,
    mask: th.Tensor | None = None,
) -> PolicyLossTerms:
    """
    The objective of :func:`decoupled_policy_loss`, with the sample estimate of the KL, and its derivative, which is
    short: that of Â·exp(log π_θ − log π_behav) is the product itself, that of a clipped sample is 0.

    :param log_prob: (batch,) log π_θ(a|s), all of them without a graph
    :param log_prob_prox: (batch,) log π_prox(a|s)
    :param log_prob_behav: (batch,) log π_behav(a|s)
    :param advantages: (batch,)
    :param limits: clip range and importance-ratio cap
    :param kl_coef: β > 0, ``None`` for no penalty
    :param mask: (batch,) bool, False for padding
    :return: loss, derivative and log-ratios
    """
    low, high, log_cap = limits
    log_ratio_behav = log_prob - log_prob_behav
    if log_cap is not None:
        log_prob_behav = th.maximum(log_prob_behav, log_prob - log_cap)
    log_ratio_prox = log_prob - log_prob_prox  # log r = log(π_θ / π_prox)
    exponent = log_prob - log_prob_behav
    bound = _MAX_EXPONENT[exponent.dtype]
    is_bounded = isinstance(log_cap, float) and log_cap <= bound
    ratio = th.exp(exponent) if is_bounded else _bounded_exp(exponent)
    objective = advantages * ratio
    weights = advantages * (-1 / valid(advantages, mask).numel())  # of the samples in the mean, with the sign
    gradient = weights * ratio
    if not is_bounded:
        gradient = th.where(exponent > bound, 0.0, gradient)
    if low is not None and high is not None:
        clipped_ratio = th.clamp(log_ratio_prox, cast(float, low), cast(float, high))  # or both tensors
        clipped = advantages * _bounded_exp(clipped_ratio + (log_prob_prox - log_prob_behav))
        # Where the minimum takes the clipped branch; a NaN is not such a place.
        gradient = th.where((clipped < objective) & (clipped_ratio != log_ratio_prox), 0.0, gradient)
        objective = th.minimum(objective, clipped)
    penalty = None
    if kl_coef is not None:
        bounded = _bounded(log_ratio_prox)
        penalty = valid(kl_coef * 0.5 * bounded**2, mask)
        gradient = gradient + kl_coef * bounded / len(penalty)
    if mask is not None:
        gradient = th.where(mask, gradient, 0.0)
    return PolicyLossTerms(valid(objective, mask), penalty, gradient, log_ratio_prox, log_ratio_behav)


@th.no_grad()
def ratio_statistics(log_ratio_prox: th.Tensor, log_ratio_behav: th.Tensor, limits: RatioLimits) -> RatioStatistics:
    """
    :param log_ratio_prox: (..., batch) log(π_θ/π_prox), without padding
    :param log_ratio_behav: (..., batch) log(π_θ/π_behav), without padding
    :param limits: clip range and importance-ratio cap
    :return: statistics of minibatches, (...)
    """
    dtype = log_ratio_prox.dtype
    zeros = th.zeros_like(log_ratio_prox[..., 0])
    low, high, log_cap = limits
    clip_fraction = cap_fraction = zeros
    if low is not None and high is not None:
        clip_fraction = ((log_ratio_prox < low) | (log_ratio_prox > high)).to(dtype).mean(-1)
    if log_cap is not None:
        cap_fraction = (log_ratio_behav > log_cap).to(dtype).mean(-1)
    approx_kl_prox = (0.5 * _bounded(log_ratio_prox) ** 2).mean(-1)
    log_ratio_max = log_ratio_behav.amax(-1)
    # A common factor of the weights cancels: the largest becomes 1, and nothing overflows.
    weights = th.exp(_bounded(log_ratio_behav) - _bounded(log_ratio_max).unsqueeze(-1))
    ess = weights.mean(-1) ** 2 / (weights**2).mean(-1)
    return RatioStatistics(clip_fraction, approx_kl_prox, _bounded_exp(log_ratio_max), cap_fraction, ess)


def approximate_kl(log_ratio: th.Tensor) -> th.Tensor:
    """
    SB3's estimate of KL(π_old ‖ π_θ), mean((r − 1) − log r).

    :param log_ratio: (..., batch) log r = log(π_θ/π_old), without padding
    :return: (...)
    """
    return ((th.exp(log_ratio) - 1) - log_ratio).mean(-1)


def value_loss(
    values: th.Tensor,
    returns: th.Tensor,
    *,
    old_values: th.Tensor | None = None,
    clip_range_vf: Coefficient | None = None,
    mask: th.Tensor | None = None,
) -> th.Tensor:
    """
    Mean squared error of the value function, mean((V − V_targ)²), optionally with SB3's value clipping:
    V is kept within ``clip_range_vf`` of the value predicted at collection.

    :param values: (batch,) V_θ(s), with gradient
    :param returns: (batch,) V_targ
    :param old_values: (batch,) values at collection, needed with ``clip_range_vf``
    :param clip_range_vf: in units of the (normalised) return, ``None`` for no clipping
    :param mask: (batch,) bool, False for padding
    :return: shape ()
    :raises ValueError: if shapes differ, or ``old_values`` is missing
    """
    _check_shapes(values, returns=returns, old_values=old_values, mask=mask)
    if clip_range_vf is not None:
        if old_values is None:
            raise ValueError("clip_range_vf needs old_values")
        bound = cast(float, clip_range_vf)  # or a tensor
        values = old_values + th.clamp(values - old_values, -bound, bound)
    if mask is None:
        return F.mse_loss(returns, values)
    return th.mean(((returns - values) ** 2)[mask])


def value_errors(
    values: th.Tensor,
    returns: th.Tensor,
    *,
    old_values: th.Tensor | None = None,
    clip_range_vf: Coefficient | None = None,
) -> tuple[th.Tensor, th.Tensor]:
    """
    :func:`value_loss` as the mean of the squares of errors.

    :param values: see there
    :param returns: see there
    :param old_values: see there
    :param clip_range_vf: see there
    :return: both (batch,): errors; half the derivative of their squares with respect to the values
    """
    if clip_range_vf is None or old_values is None:
        errors = values - returns
        return errors, errors
    bound = cast(float, clip_range_vf)  # or a tensor
    difference = values - old_values
    clipped = th.clamp(difference, -bound, bound)
    errors = old_values + clipped - returns
    return errors, th.where(clipped != difference, 0.0, errors)


def entropy_loss(entropy: th.Tensor | None, log_prob: th.Tensor, mask: th.Tensor | None = None) -> th.Tensor:
    """
    Negative mean entropy. Distributions without a closed form are estimated by −log π_θ(a|s).

    :param entropy: (batch,), or ``None`` without a closed form
    :param log_prob: (batch,)
    :param mask: (batch,) bool, False for padding
    :return: shape ()
    """
    return -masked_mean(-log_prob if entropy is None else entropy, mask)


def auxiliary_loss(
    kl: th.Tensor,
    values: th.Tensor,
    aux_values: th.Tensor,
    returns: th.Tensor,
    *,
    beta_clone: float = 1.0,
    vf_true_coef: float = 1.0,
    vf_aux_coef: float = 1.0,
) -> tuple[th.Tensor, AuxiliaryLossStats]:
    """
    Joint objective of the auxiliary phase, to be minimised::

        ½·c_aux·E[(V_aux − V_targ)²] + β_clone·E[KL(π_old ‖ π_θ)] + ½·c_vf·E[(V − V_targ)²]

    Source: Cobbe et al. 2020, https://arxiv.org/abs/2009.04416, §2; c_aux and c_vf are 1 there.

    :param kl: (batch,) KL(π_old ‖ π_θ) per state, summed over action dimensions, with gradient
    :param values: (batch,) V, with gradient
    :param aux_values: (batch,) V_aux, with gradient
    :param returns: (batch,) V_targ, the value targets of the policy phase
    :param beta_clone: β_clone ≥ 0
    :param vf_true_coef: c_vf ≥ 0
    :param vf_aux_coef: c_aux ≥ 0
    :return: loss of shape (), statistics
    :raises ValueError: if shapes differ or a coefficient is negative
    """
    _check_shapes(kl, values=values, aux_values=aux_values, returns=returns)
    coefficients = {"beta_clone": beta_clone, "vf_true_coef": vf_true_coef, "vf_aux_coef": vf_aux_coef}
    for name, coefficient in coefficients.items():
        if not 0 <= coefficient < math.inf:
            raise ValueError(f"{name} must be >= 0 and finite, got {coefficient}")
    policy_kl = kl.mean()
    value_loss = 0.5 * F.mse_loss(values, returns)
    aux_value_loss = 0.5 * F.mse_loss(aux_values, returns)
    loss = vf_aux_coef * aux_value_loss + beta_clone * policy_kl + vf_true_coef * value_loss
    return loss, AuxiliaryLossStats(policy_kl.detach(), value_loss.detach(), aux_value_loss.detach())


def analytic_kl(
    prox: Distribution | Sequence[Distribution], current: Distribution | Sequence[Distribution]
) -> th.Tensor:
    """
    KL(π_prox ‖ π_θ) per state, summed over action dimensions. A sequence stands for independent dimensions.

    ``torch.distributions.kl_divergence`` keeps the action dimension of a diagonal Gaussian and of independent
    Bernoulli variables; it is summed here. Where it computes with probabilities, which underflow to 0 and give Inf
    (Bernoulli at a logit of 17, categorical at 104 in float32), logits are used instead.

    :param prox: distribution(s) of π_prox for a batch of states
    :param current: distribution(s) of π_θ for the same states, with gradient
    :return: (batch,)
    """
    if isinstance(prox, Distribution):
        prox = [prox]
    if isinstance(current, Distribution):
        current = [current]
    terms = []
    for p, q in zip(prox, current, strict=True):
        term = _kl(p, q)
        terms.append(term.sum(dim=-1) if term.dim() > 1 else term)
    return th.stack(terms).sum(dim=0)


def _kl(p: Distribution, q: Distribution) -> th.Tensor:
    if isinstance(p, Categorical) and isinstance(q, Categorical):
        return categorical_kl(p.probs, p.logits, q.logits)
    if isinstance(p, Bernoulli) and isinstance(q, Bernoulli):
        return bernoulli_kl(p.logits, q.logits)
    return kl_divergence(p, q)


def categorical_kl(probs: th.Tensor, log_probs: th.Tensor, other_log_probs: th.Tensor) -> th.Tensor:
    """
    :param probs: (batch, n) p
    :param log_probs: (batch, n) log p
    :param other_log_probs: (batch, n) log q
    :return: (batch,) KL(p ‖ q)
    """
    # Σ p·(log p − log q); where p is 0, as for a masked action, the difference may be Inf − Inf
    difference = th.where(probs > 0, log_probs - other_log_probs, 0.0)
    return (probs * difference).sum(dim=-1)


def bernoulli_kl(logits: th.Tensor, other_logits: th.Tensor) -> th.Tensor:
    """
    :param logits: of p, any shape
    :param other_logits: of q, of the same shape
    :return: KL(p ‖ q) of each variable
    """
    yes = F.logsigmoid(logits) - F.logsigmoid(other_logits)
    no = F.logsigmoid(-logits) - F.logsigmoid(-other_logits)
    return th.sigmoid(logits) * yes + th.sigmoid(-logits) * no


class _WithGradient(th.autograd.Function):
    """A value whose derivative is already known."""

    @staticmethod
    def forward(ctx: Any, log_prob: th.Tensor, loss: th.Tensor, gradient: th.Tensor) -> th.Tensor:
        ctx.save_for_backward(gradient)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: th.Tensor) -> tuple[th.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return grad_output * gradient, None, None


def _bounded_exp(exponent: th.Tensor) -> th.Tensor:
    return th.exp(th.clamp(exponent, max=_MAX_EXPONENT[exponent.dtype]))


def _bounded(log_ratio: th.Tensor) -> th.Tensor:
    bound = _MAX_LOG_RATIO[log_ratio.dtype]
    return th.clamp(log_ratio, -bound, bound)


def _check_coefficients(clip_range: float | None, kl_coef: float, max_importance_ratio: float | None) -> None:
    if clip_range is not None and not 0 <= clip_range < 1:
        raise ValueError(f"clip_range must be in [0, 1) or None, got {clip_range}")
    if not 0 <= kl_coef < math.inf:
        raise ValueError(f"kl_coef must be >= 0 and finite, got {kl_coef}")
    if max_importance_ratio is not None and not max_importance_ratio >= 1:
        raise ValueError(f"max_importance_ratio must be >= 1 or None, got {max_importance_ratio}")


def _check_shapes(first: th.Tensor, **others: th.Tensor | None) -> None:
    # Silent broadcasting, e.g. of (N,) with (N, 1), would give a plausible but wrong loss.
    for name, tensor in others.items():
        if tensor is not None and tensor.shape != first.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(first.shape)}")
