"""
Losses of PPO with decoupled proximal and behaviour policies, as pure functions on tensors.

Symbols of the paper (Hilton, Cobbe, Schulman 2022, https://arxiv.org/abs/2110.00641) and their names here: π_θ
``log_prob``, π_prox ``log_prob_prox``, π_behav ``log_prob_behav``, Â ``advantages``, ε ``clip_range``, M
``max_importance_ratio``, β ``kl_coef``.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias, cast

import torch as th
from torch.distributions import Bernoulli, Categorical, Distribution, kl_divergence
from torch.nn import functional as F

# exp() of more than this is taken as exp() of this. Below, nothing changes; above, float32 would soon overflow
# (at 88) and a gradient through an overflowed branch that min() did not choose would be 0 * Inf = NaN.
MAX_EXPONENT = {th.float64: 300.0, th.float32: 40.0, th.bfloat16: 40.0, th.float16: 5.0}
# Log-ratios are squared for the sample estimate of the KL divergence: their squares must not overflow either.
_MAX_LOG_RATIO = {th.float64: 1e120, th.float32: 1e15, th.bfloat16: 1e15, th.float16: 100.0}

# A number, or a tensor of shape () where a compiled graph must not depend on its value
Coefficient: TypeAlias = float | th.Tensor


class PolicyLossStats(NamedTuple):
    """
    Detached statistics of one minibatch, all of shape ().

    :param policy_gradient_loss: the surrogate loss
    :param clip_fraction: share of samples whose π_θ/π_prox lies outside [1 − ε, 1 + ε]; 0 when the clip is off
    :param approx_kl_prox: ½·mean((log π_θ − log π_prox)²)
    :param importance_ratio_max: largest π_θ/π_behav, before the cap
    :param importance_cap_fraction: share of samples whose π_θ/π_behav exceeds the cap; 0 when there is none
    :param importance_ess: effective sample size of the weights w = π_θ/π_behav, (Σw)²/(n·Σw²), before the cap
    """

    policy_gradient_loss: th.Tensor
    clip_fraction: th.Tensor
    approx_kl_prox: th.Tensor
    importance_ratio_max: th.Tensor
    importance_cap_fraction: th.Tensor
    importance_ess: th.Tensor


class AuxiliaryLossStats(NamedTuple):
    """
    Detached terms of the auxiliary loss of one minibatch without their coefficients, all of shape ().

    :param policy_kl: E[KL(π_old ‖ π_θ)]
    :param value_loss: E[(V − V_targ)²], on the scale of ``train/value_loss``
    :param aux_value_loss: E[(V_aux − V_targ)²]
    """

    policy_kl: th.Tensor
    value_loss: th.Tensor
    aux_value_loss: th.Tensor


def drop_padding(values: th.Tensor, mask: th.Tensor | None) -> th.Tensor:
    """
    :param values: (batch,)
    :param mask: (batch,) bool, False for padding; ``None``: nothing is padded
    :return: the entries that count
    """
    return values if mask is None else values[mask]


def masked_mean(values: th.Tensor, mask: th.Tensor | None = None) -> th.Tensor:
    """
    Mean over the entries that count.

    :param values: (batch,)
    :param mask: (batch,) bool, False for padding; ``None``: nothing is padded
    :return: shape ()
    """
    return drop_padding(values, mask).mean()


def decoupled_policy_loss(
    log_prob: th.Tensor,
    log_prob_prox: th.Tensor,
    log_prob_behav: th.Tensor,
    advantages: th.Tensor,
    *,
    clip_range: Coefficient | None = 0.2,
    max_importance_ratio: Coefficient | None = 100.0,
    mask: th.Tensor | None = None,
) -> tuple[th.Tensor, PolicyLossStats]:
    """
    Decoupled policy objective, to be minimised::

        clip:     −E[ (π_prox/π_behav) · min(r·Â, clip(r, 1−ε, 1+ε)·Â) ],   r = π_θ/π_prox
        no clip:  −E[ (π_θ/π_behav) · Â ]

    With π_prox = π_behav it is PPO's. The KL penalty β·KL(π_prox ‖ π_θ) is a term of its own: :func:`sampled_kl` or
    :func:`analytic_kl`. The importance-ratio cap M replaces log π_behav by max(log π_behav, log π_θ − log M), without
    gradient, so that a capped sample keeps a bounded gradient. Everything stays in log space until the last exp(),
    whose argument is limited to 40 in float32 and 300 in float64: loss and gradients are finite for any
    log-probabilities with finite differences.

    Source: Hilton et al. 2022, §2; the cap as in its released code.

    :param log_prob: (batch,) log π_θ(a|s), with gradient
    :param log_prob_prox: (batch,) log π_prox(a|s)
    :param log_prob_behav: (batch,) log π_behav(a|s)
    :param advantages: (batch,), already normalised
    :param clip_range: ε ≥ 0, or ``None`` for no clip; from 1 on, the ratio has no lower bound
    :param max_importance_ratio: M ≥ 1, or ``None`` for no cap
    :param mask: (batch,) bool, False for padding
    :return: loss of shape (), statistics
    :raises ValueError: if shapes differ or a coefficient is out of its range
    """
    _check_shapes(
        log_prob, log_prob_prox=log_prob_prox, log_prob_behav=log_prob_behav, advantages=advantages, mask=mask
    )
    _check_coefficients(clip_range, max_importance_ratio)
    # Sum the gradients of both branches before that of the entropy is added: this is how SB3's are rounded.
    log_prob = log_prob.view_as(log_prob)
    # log max(π_behav, π_θ/M)
    behav = log_prob_behav
    if max_importance_ratio is not None:
        behav = th.maximum(behav, log_prob.detach() - log_of(max_importance_ratio))
    # (π_θ/π_behav)·Â
    objective = advantages * bounded_exp(log_prob - behav)
    if clip_range is not None:
        # (π_prox/π_behav)·min(r·Â, clip(r, 1−ε, 1+ε)·Â), r = π_θ/π_prox
        clipped_log_ratio = th.clamp(log_prob - log_prob_prox, *log_clip_limits(clip_range))  # type: ignore[arg-type]
        objective = th.min(objective, advantages * bounded_exp(clipped_log_ratio + (log_prob_prox - behav)))
    loss = -masked_mean(objective, mask)
    stats = ratio_statistics(
        drop_padding(log_prob.detach() - log_prob_prox, mask),
        drop_padding(log_prob.detach() - log_prob_behav, mask),
        clip_range,
        max_importance_ratio,
    )
    return loss, PolicyLossStats(loss.detach(), **stats)


@th.no_grad()
def ratio_statistics(
    log_ratio_prox: th.Tensor,
    log_ratio_behav: th.Tensor,
    clip_range: Coefficient | None,
    max_importance_ratio: Coefficient | None,
) -> dict[str, th.Tensor]:
    """
    :param log_ratio_prox: (..., batch) log(π_θ/π_prox), without padding
    :param log_ratio_behav: (..., batch) log(π_θ/π_behav), without padding
    :param clip_range: ε, or ``None`` for no clip
    :param max_importance_ratio: M, or ``None`` for no cap
    :return: the fields of :class:`PolicyLossStats` but the first, (...) each
    """
    dtype = log_ratio_prox.dtype
    clip_fraction = cap_fraction = th.zeros_like(log_ratio_prox[..., 0])
    if clip_range is not None:
        low, high = log_clip_limits(clip_range)
        clip_fraction = ((log_ratio_prox < low) | (log_ratio_prox > high)).to(dtype).mean(-1)
    if max_importance_ratio is not None:
        cap_fraction = (log_ratio_behav > log_of(max_importance_ratio)).to(dtype).mean(-1)
    log_ratio_max = log_ratio_behav.amax(-1)
    # A common factor of the weights cancels: the largest becomes 1, and nothing overflows.
    weights = th.exp(bounded_log_ratio(log_ratio_behav) - bounded_log_ratio(log_ratio_max).unsqueeze(-1))
    return {
        "clip_fraction": clip_fraction,
        "approx_kl_prox": (0.5 * bounded_log_ratio(log_ratio_prox) ** 2).mean(-1),
        "importance_ratio_max": bounded_exp(log_ratio_max),
        "importance_cap_fraction": cap_fraction,
        "importance_ess": weights.mean(-1) ** 2 / (weights**2).mean(-1),
    }


def log_clip_limits(clip_range: Coefficient) -> tuple[Coefficient, Coefficient]:
    """
    :param clip_range: ε ≥ 0
    :return: log(1 − ε), which is −Inf from ε = 1 on, and log(1 + ε)
    """
    if isinstance(clip_range, th.Tensor):
        return th.log(th.clamp(1 - clip_range, min=0)), th.log(1 + clip_range)
    return (math.log(1 - clip_range) if clip_range < 1 else -math.inf), math.log(1 + clip_range)


def sampled_kl(log_prob: th.Tensor, log_prob_prox: th.Tensor, mask: th.Tensor | None = None) -> th.Tensor:
    """
    Estimate of KL(π_prox ‖ π_θ) on the actions taken, ½·mean((log π_θ − log π_prox)²).

    Source: released code of Hilton et al. 2022.

    :param log_prob: (batch,) log π_θ(a|s), with gradient
    :param log_prob_prox: (batch,) log π_prox(a|s)
    :param mask: (batch,) bool, False for padding
    :return: shape ()
    :raises ValueError: if shapes differ
    """
    _check_shapes(log_prob, log_prob_prox=log_prob_prox, mask=mask)
    return masked_mean(0.5 * bounded_log_ratio(log_prob - log_prob_prox) ** 2, mask)


def approximate_kl(log_ratio: th.Tensor) -> th.Tensor:
    """
    SB3's estimate of KL(π_old ‖ π_θ), mean((r − 1) − log r); finite for any finite log r, as the policy loss.

    :param log_ratio: (..., batch) log r = log(π_θ/π_old), without padding
    :return: (...)
    """
    return ((bounded_exp(log_ratio) - 1) - log_ratio).mean(-1)


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
    value_loss = F.mse_loss(values, returns)
    aux_value_loss = F.mse_loss(aux_values, returns)
    # ½·c_aux·E[(V_aux − V_targ)²] + β_clone·E[KL(π_old ‖ π_θ)] + ½·c_vf·E[(V − V_targ)²]
    loss = 0.5 * vf_aux_coef * aux_value_loss + beta_clone * policy_kl + 0.5 * vf_true_coef * value_loss
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


def bounded_exp(exponent: th.Tensor) -> th.Tensor:
    """
    :param exponent: any shape
    :return: exp() of it, or of 40 (float32), 300 (float64) where it is larger
    """
    return th.exp(th.clamp(exponent, max=MAX_EXPONENT[exponent.dtype]))


def bounded_log_ratio(log_ratio: th.Tensor) -> th.Tensor:
    """
    :param log_ratio: any shape
    :return: the same within bounds whose squares do not overflow
    """
    bound = _MAX_LOG_RATIO[log_ratio.dtype]
    return th.clamp(log_ratio, -bound, bound)


def log_of(value: Coefficient) -> Coefficient:
    """
    :param value: a number, or a tensor that stands for one
    :return: its logarithm
    """
    return th.log(value) if isinstance(value, th.Tensor) else math.log(value)


def _check_coefficients(clip_range: Coefficient | None, max_importance_ratio: Coefficient | None) -> None:
    # The values of tensors are those of checked numbers.
    if isinstance(clip_range, float | int) and not clip_range >= 0:
        raise ValueError(f"clip_range must be >= 0 or None, got {clip_range}")
    if isinstance(max_importance_ratio, float | int) and not max_importance_ratio >= 1:
        raise ValueError(f"max_importance_ratio must be >= 1 or None, got {max_importance_ratio}")


def _check_shapes(first: th.Tensor, **others: th.Tensor | None) -> None:
    # Silent broadcasting, e.g. of (N,) with (N, 1), would give a plausible but wrong loss.
    for name, tensor in others.items():
        if tensor is not None and tensor.shape != first.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(first.shape)}")
