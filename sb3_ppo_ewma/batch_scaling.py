"""
Batch size-invariance: rescale hyper-parameters so that training behaves the same with another number of environments.

With ratio = new / old number of environments, both batches are multiplied by ratio, the samples of an iteration and the
samples of a gradient step. The same number of environment steps then has 1/ratio times the iterations and gradient
steps. The learning rate compensates for that. Quantities counted in iterations or gradient steps are divided by ratio,
so that they stay the same in environment steps.

This holds for one policy epoch, for advantages that are not normalised per minibatch, and below the critical batch
size.

Source: Hilton, Cobbe, Schulman 2022, https://arxiv.org/abs/2110.00641
"""

import inspect
import math
import warnings
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, NamedTuple

import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.type_aliases import Schedule

from sb3_ppo_ewma._arguments import check_integer, check_number, check_schedule
from sb3_ppo_ewma._parallel.process_group import world_size
from sb3_ppo_ewma.ewma import (
    center_of_mass_from_decay,
    decay_from_center_of_mass,
    decay_from_span,
    default_center_of_mass,
    span_from_decay,
)
from sb3_ppo_ewma.ppg import default_aux_batch_size
from sb3_ppo_ewma.ppo_ewma import EwmaMixin

_PAPER = "Hilton et al. 2022"
# Hyper-parameters that the rules read: those that every algorithm has, and those that only some have
_REQUIRED = ("n_envs", "n_steps", "batch_size", "n_epochs", "learning_rate", "prox_decay", "advantage_decay")
_OPTIONAL = ("n_policy_iterations", "aux_batch_size", "aux_learning_rate", "max_grad_norm")
# Hyper-parameters that data-parallel training divides between its processes, with their units
_DIVIDED = {"n_envs": "environments", "batch_size": "samples", "aux_batch_size": "samples"}
# Arguments of the constructor that are not hyper-parameters
_NOT_HYPERPARAMETERS = ("policy", "env", "_init_setup_model")
# optimizer_kwargs of this package's policies where the user gives none
_DEFAULT_ADAM_KWARGS = {"eps": 1e-5}
# A floating-point ratio becomes the nearest fraction with at most this denominator.
_LARGEST_DENOMINATOR = 2**20


class Change(NamedTuple):
    """
    The effect of a rule on one hyper-parameter.

    :param name: name of the hyper-parameter
    :param old: old value
    :param new: new value
    :param rule: the rule in words
    :param source: where the rule comes from
    """

    name: str
    old: Any
    new: Any
    rule: str
    source: str


class Rescaled(NamedTuple):
    """
    Hyper-parameters for another number of environments.

    :param hyperparameters: all hyper-parameters
    :param changes: the effect of every rule, even where the value stays the same
    """

    hyperparameters: dict[str, Any]
    changes: tuple[Change, ...]

    @property
    def explanation(self) -> str:
        """A text table with the columns name, old → new, rule and source."""
        rows = [
            (change.name, f"{_format(change.old)} → {_format(change.new)}", change.rule, change.source)
            for change in self.changes
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        return "\n".join(
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]) for row in rows
        )


class ScaledSchedule:
    """
    A schedule multiplied by a constant; a class instead of a lambda, so that ``repr`` shows what it is.

    :param schedule: schedule of the remaining progress, from 1 to 0
    :param factor: the constant
    """

    def __init__(self, schedule: Schedule, factor: float) -> None:
        self.schedule, self.factor = schedule, factor

    def __call__(self, progress_remaining: float) -> float:
        return self.factor * self.schedule(progress_remaining)

    def __repr__(self) -> str:
        return f"{self.factor:.4g} * {self.schedule!r}"


# === Rules ===
# One function per quantity; ratio = new batch / old batch


def adam_learning_rate(learning_rate: float, ratio: float) -> float:
    """
    :param learning_rate: α of Adam
    :param ratio: new batch / old batch
    :return: α·√ratio
    """
    return learning_rate * math.sqrt(ratio)


def sgd_learning_rate(learning_rate: float, ratio: float) -> float:
    """
    :param learning_rate: α of stochastic gradient descent
    :param ratio: new batch / old batch
    :return: α·ratio
    """
    return learning_rate * ratio


def adam_beta(beta: float, ratio: float) -> float:
    """
    :param beta: β₁ or β₂ of Adam, a decay per gradient step
    :param ratio: new batch / old batch
    :return: β to the power of ratio, the same decay per sample
    """
    return math.pow(beta, ratio)


def max_grad_norm(norm: float, ratio: float) -> float:
    """
    :param norm: norm that gradients are clipped to
    :param ratio: new batch / old batch
    :return: norm/√ratio. Below the critical batch size a gradient is mostly noise, averaged over the minibatch, so its
        norm is proportional to 1/√batch. The rule is ours: the paper does not clip gradients
    """
    return norm / math.sqrt(ratio)


def prox_decay(decay: float, ratio: float) -> float:
    """
    :param decay: β_prox, decay of the EWMA of the parameters per gradient step
    :param ratio: new batch / old batch
    :return: decay whose centre of mass 1/(1−β) − 1 is divided by ratio, so that it has the same age in samples
    """
    return decay_from_center_of_mass(center_of_mass_from_decay(decay) / ratio)


def advantage_decay(decay: float, ratio: float) -> float:
    """
    :param decay: d, decay of the advantages' moments per iteration
    :param ratio: new batch / old batch
    :return: decay whose span 2/(1−d) − 1 is divided by ratio, so that it covers the same number of samples
    :raises ValueError: if the span would be shorter than an iteration
    """
    span = span_from_decay(decay) / ratio
    if span < 1 - 1e-12:
        raise ValueError(
            f"advantage_decay={decay:.4g} normalises over a span of {span_from_decay(decay):.4g} iterations, which "
            f"would be {span:.4g} of the new ones, and it cannot be less than 1: advantage_decay must be at least "
            f"{decay_from_span(ratio):.4g}"
        )
    return decay_from_span(max(span, 1.0))


def count(name: str, number: int, ratio: Fraction, unit: str) -> int:
    """
    :param name: name of the hyper-parameter, for the error message
    :param number: number of environments, samples or iterations
    :param ratio: new number / old number
    :param unit: unit of the number, for the error message
    :return: number·ratio
    :raises ValueError: if number·ratio is not a whole number
    """
    result = number * ratio
    if result.denominator != 1:
        raise ValueError(f"{name}={number} times {ratio} is {float(result):.4g}, not a whole number of {unit}")
    return int(result)


# === Hyper-parameters ===


def rescale(
    hyperparameters: Mapping[str, Any],
    ratio: float | Fraction,
    *,
    adam_betas: bool = False,
    critical_batch_size: float | None = None,
) -> Rescaled:
    """
    Rescale hyper-parameters so that training behaves the same, as a function of environment steps, when the number of
    environments is multiplied by ``ratio``.

    Adam's learning rate is multiplied by √ratio, SGD's by ratio. The centre of mass of ``prox_decay``, the span of
    ``advantage_decay``, ``n_policy_iterations`` and ``staleness`` are divided by ratio, ``max_grad_norm`` by √ratio.
    The auxiliary phase keeps its minibatches and its learning rate. ``prox_decay="auto"`` and ``aux_batch_size=None``,
    which depend on the number of environments, become the numbers they stand for.

    >>> import math
    >>> from sb3_ppo_ewma.batch_scaling import rescale
    >>> paper = dict(n_envs=256, n_steps=256, batch_size=8192, n_epochs=1, learning_rate=5e-4, prox_decay=8 / 9,
    ...              advantage_decay=0.0, n_policy_iterations=32, aux_batch_size=4096)
    >>> small = rescale(paper, 1 / 64).hyperparameters
    >>> small["n_envs"], small["batch_size"], small["n_policy_iterations"], round(small["learning_rate"], 7)
    (4, 128, 2048, 6.25e-05)

    Source: Hilton et al. 2022, https://arxiv.org/abs/2110.00641. The rules for ``staleness`` and ``max_grad_norm`` are
    ours.

    :param hyperparameters: ``n_envs`` and keyword arguments of an algorithm, from :func:`settings_of` or
        :func:`with_defaults`. Learning rates are numbers, schedules or the zoo's ``lin_NUMBER``
    :param ratio: new / old number of environments
    :param adam_betas: whether to adjust β₁ and β₂ of Adam, which the paper did not need; with PPG also those of the
        auxiliary phase, whose Adam has the policy's settings
    :param critical_batch_size: critical batch size in samples, as :class:`~sb3_ppo_ewma.NoiseScaleCallback` estimates
        it, or ``None`` if unknown; minibatches above it cause a warning
    :return: new hyper-parameters and an explanation
    :raises TypeError: if an argument has the wrong type
    :raises ValueError: if there is no rule: for several policy epochs, advantages normalised per minibatch, no EWMA,
        ``target_kl``, an optimiser other than Adam and SGD, a schedule that cannot be scaled, a result that is not a
        whole number, an advantage span below one iteration
    """
    ratio = _checked_ratio(ratio)
    old = _checked_hyperparameters(hyperparameters)
    if critical_batch_size is not None:
        check_number("critical_batch_size", critical_batch_size, 0)
    changes = _apply_rules(old, ratio, adam_betas)
    _warn_above_critical_batch_size({change.name: change.new for change in changes}, ratio, critical_batch_size)
    return Rescaled({**old, **{change.name: change.new for change in changes}}, tuple(changes))


def settings_of(model: BaseAlgorithm) -> dict[str, Any]:
    """
    :param model: model of one of this package's algorithms
    :return: ``n_envs`` and the keyword arguments that build the same model for other environments; in data-parallel
        training, those of a single process that does the work of all
    :raises TypeError: if ``model`` is of another class
    """
    if not isinstance(model, EwmaMixin):
        raise TypeError(f"model must be one of this package's algorithms, got {type(model).__name__}")
    names = [name for name in inspect.signature(type(model)).parameters if name not in _NOT_HYPERPARAMETERS]
    settings = {"n_envs": model.n_envs, **{name: getattr(model, name) for name in names if hasattr(model, name)}}
    totals = {name: settings[name] * world_size() for name in _DIVIDED if settings.get(name) is not None}
    return {**settings, **totals}


def per_process(hyperparameters: Mapping[str, Any], n_processes: int) -> dict[str, Any]:
    """
    Divide environments and minibatches between the processes of a data-parallel training, which together then do the
    same as one process.

    >>> from sb3_ppo_ewma.batch_scaling import per_process
    >>> per_process(dict(n_envs=64, n_steps=256, batch_size=2048), 4)
    {'n_envs': 16, 'n_steps': 256, 'batch_size': 512}

    :param hyperparameters: hyper-parameters of the whole training, with ``n_envs`` and ``batch_size``
        (:func:`with_defaults` adds them)
    :param n_processes: number of processes, at least 1
    :return: hyper-parameters of one process
    :raises TypeError: if ``n_processes`` is not an integer
    :raises ValueError: if a number cannot be divided, or ``n_envs`` or ``batch_size`` is missing
    """
    check_integer("n_processes", n_processes, minimum=1)
    missing = [name for name in ("n_envs", "batch_size") if name not in hyperparameters]
    if missing:
        raise ValueError(f"hyperparameters must have {', '.join(missing)}: with_defaults() adds what is not given")
    parts = dict(hyperparameters)
    for name, unit in _DIVIDED.items():
        number = parts.get(name)
        if number is None:
            continue
        check_integer(name, number, minimum=1)
        if number % n_processes:
            raise ValueError(
                f"{name}={number} {unit} cannot be divided between {n_processes} processes: it must be a multiple of "
                f"{n_processes}"
            )
        parts[name] = number // n_processes
    return parts


def with_defaults(algorithm: type[BaseAlgorithm], hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """
    :param algorithm: class of one of this package's algorithms
    :param hyperparameters: some of its keyword arguments, optionally with ``n_envs`` (default 1)
    :return: these hyper-parameters and the defaults of the others that the rules read
    :raises TypeError: if ``algorithm`` is not such a class
    """
    if not (isinstance(algorithm, type) and issubclass(algorithm, EwmaMixin)):
        raise TypeError(f"algorithm must be a class of this package's algorithms, got {algorithm!r}")
    parameters = inspect.signature(algorithm).parameters
    defaults = {name: parameters[name].default for name in (*_REQUIRED, *_OPTIONAL) if name in parameters}
    if not hyperparameters.get("normalize_advantage", True):
        defaults["advantage_decay"] = None  # as the constructor does
    return {"n_envs": 1, **defaults, **hyperparameters}


def _checked_ratio(ratio: Any) -> Fraction:
    if isinstance(ratio, bool) or not isinstance(ratio, int | float | Fraction):
        raise TypeError(f"ratio must be a positive number, new / old number of environments, got {ratio!r}")
    if not 0 < ratio < math.inf:
        raise ValueError(f"ratio must be positive and finite, got {ratio}")
    return Fraction(ratio).limit_denominator(_LARGEST_DENOMINATOR)


def _checked_hyperparameters(hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """
    :param hyperparameters: the user's argument
    :return: a copy
    :raises ValueError: if they cannot be rescaled, with the reason
    """
    old = dict(hyperparameters)
    missing = [name for name in _REQUIRED if name not in old]
    if missing:
        raise ValueError(
            f"hyperparameters must have {', '.join(missing)}: with_defaults(algorithm, hyperparameters) adds what is "
            "not given"
        )
    for name in ("n_envs", "n_steps", "n_epochs"):
        check_integer(name, old[name], minimum=1)
    if old["n_epochs"] != 1:
        raise ValueError(
            f"n_epochs={old['n_epochs']} cannot be rescaled: with several policy epochs, training depends on how an "
            "iteration is divided into minibatches, which no other hyper-parameter compensates for; use n_epochs=1"
        )
    if old["prox_decay"] is None:
        raise ValueError(
            "prox_decay=None cannot be rescaled: without an EWMA, the proximal policy is the behaviour policy, whose "
            "age in samples changes with the number of environments; use prox_decay='auto' or a number"
        )
    if old["advantage_decay"] is None and old.get("normalize_advantage", True):
        raise ValueError(
            "advantage_decay=None cannot be rescaled: it normalises advantages per minibatch, so that their scale "
            "depends on its size; use advantage_decay=0.0, which normalises per iteration, or "
            "normalize_advantage=False"
        )
    if old.get("target_kl") is not None:
        raise ValueError(
            f"target_kl={old['target_kl']} cannot be rescaled: it ends an iteration at a distance from the behaviour "
            "policy, whose age depends on the number of environments; use target_kl=None"
        )
    return old


def _apply_rules(old: Mapping[str, Any], ratio: Fraction, adam_betas: bool) -> list[Change]:
    n_envs, batch_size = old["n_envs"], old["batch_size"]
    n_samples = n_envs * old["n_steps"]
    new_envs = count("n_envs", n_envs, ratio, "environments")
    changes = [Change("n_envs", n_envs, new_envs, "× ratio", f"ratio {ratio}")]
    if batch_size is not None:
        check_integer("batch_size", batch_size, minimum=1)
        new_batch_size = count("batch_size", batch_size, ratio, "samples")
        changes.append(Change("batch_size", batch_size, new_batch_size, "× ratio", _PAPER))
    changes += _optimizer_changes(old, ratio, adam_betas)
    decay: Any = old["prox_decay"]
    if decay == "auto":
        decay = decay_from_center_of_mass(default_center_of_mass(n_samples, batch_size))
    check_number("prox_decay", decay, 0, 1)
    new_decay = prox_decay(decay, float(ratio))
    centers = (
        f"centre of mass ÷ ratio: {center_of_mass_from_decay(decay):.4g} → "
        f"{center_of_mass_from_decay(new_decay):.4g} gradient steps"
    )
    changes.append(Change("prox_decay", old["prox_decay"], new_decay, centers, _PAPER))
    if old["advantage_decay"] is not None:
        check_number("advantage_decay", old["advantage_decay"], 0, 1)
        new_decay = advantage_decay(old["advantage_decay"], float(ratio))
        spans = (
            f"span ÷ ratio: {span_from_decay(old['advantage_decay']):.4g} → {span_from_decay(new_decay):.4g} iterations"
        )
        changes.append(Change("advantage_decay", old["advantage_decay"], new_decay, spans, _PAPER))
    if old.get("staleness"):
        new_staleness = count("staleness", old["staleness"], 1 / ratio, "iterations")
        changes.append(Change("staleness", old["staleness"], new_staleness, "÷ ratio", "the same age in samples"))
    if "n_policy_iterations" in old:
        changes += _auxiliary_phase_changes(old, ratio, n_samples)
    norm = old.get("max_grad_norm", math.inf)
    if norm < math.inf:
        new_norm = max_grad_norm(norm, float(ratio))
        changes.append(Change("max_grad_norm", norm, new_norm, "÷ √ratio, as gradients of noise", "size of a mean"))
    return changes


def _optimizer_changes(old: Mapping[str, Any], ratio: Fraction, adam_betas: bool) -> list[Change]:
    policy_kwargs = old.get("policy_kwargs") or {}
    if not isinstance(policy_kwargs, Mapping):
        raise TypeError(f"policy_kwargs must be a dictionary or None, got {policy_kwargs!r}")
    kwargs: Mapping[str, Any] = policy_kwargs.get("optimizer_kwargs") or {}
    optimizer = policy_kwargs.get("optimizer_class", th.optim.Adam)
    is_adam = optimizer is th.optim.Adam
    if not (is_adam or optimizer is th.optim.SGD) or kwargs.get("weight_decay"):
        raise ValueError(
            "optimizer_class must be torch.optim.Adam or torch.optim.SGD, without weight decay, to be rescaled: there "
            f"is no rule for {getattr(optimizer, '__name__', optimizer)} with {dict(kwargs)}"
        )
    rule, name = (adam_learning_rate, "× √ratio, Adam") if is_adam else (sgd_learning_rate, "× ratio, SGD")
    rate = old["learning_rate"]
    changes = [Change("learning_rate", rate, _scale_learning_rate(rate, rule(1.0, float(ratio))), name, _PAPER)]
    if adam_betas and is_adam:
        betas = kwargs.get("betas", (0.9, 0.999))
        new_betas = tuple(adam_beta(beta, float(ratio)) for beta in betas)
        new_kwargs = {**policy_kwargs, "optimizer_kwargs": {**(kwargs or _DEFAULT_ADAM_KWARGS), "betas": new_betas}}
        rule_in_words = f"Adam's betas to the power of ratio: {_format(betas)} → {_format(new_betas)}"
        changes.append(Change("policy_kwargs", old.get("policy_kwargs"), new_kwargs, rule_in_words, _PAPER))
    return changes


def _auxiliary_phase_changes(old: Mapping[str, Any], ratio: Fraction, n_samples: int) -> list[Change]:
    n_iterations = old["n_policy_iterations"]
    check_integer("n_policy_iterations", n_iterations, minimum=1)
    new_iterations = count("n_policy_iterations", n_iterations, 1 / ratio, "iterations")
    changes = [Change("n_policy_iterations", n_iterations, new_iterations, "÷ ratio", _PAPER)]
    # The phase keeps its number of samples, and so its minibatches and its learning rate.
    size = old.get("aux_batch_size")
    new_size = default_aux_batch_size(n_samples) if size is None else size
    changes.append(Change("aux_batch_size", size, new_size, "kept, as a number", _PAPER))
    if "aux_learning_rate" in old:
        rate = old["aux_learning_rate"]
        changes.append(Change("aux_learning_rate", rate, rate, "kept", _PAPER))
    return changes


def _scale_learning_rate(learning_rate: Any, factor: float) -> Any:
    """
    :param learning_rate: number, schedule or ``lin_NUMBER``
    :param factor: factor to multiply it by
    :return: the product: a number, schedule or ``lin_NUMBER`` again
    :raises ValueError: for any other string
    """
    if isinstance(learning_rate, str):
        kind, _, number = learning_rate.partition("_")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if kind != "lin" or not math.isfinite(value):
            raise ValueError(
                f"learning_rate={learning_rate!r} cannot be rescaled: it must be a number, a schedule or lin_NUMBER"
            )
        return f"lin_{value * factor!r}"
    check_schedule("learning_rate", learning_rate)
    if isinstance(learning_rate, ScaledSchedule):
        return ScaledSchedule(learning_rate.schedule, learning_rate.factor * factor)
    return ScaledSchedule(learning_rate, factor) if callable(learning_rate) else float(learning_rate) * factor


def _warn_above_critical_batch_size(new: Mapping[str, Any], ratio: Fraction, critical: float | None) -> None:
    size = new.get("batch_size")
    if critical is not None and size is not None and size > critical:
        reason = f"the critical batch size is {critical:.4g}"
    elif critical is None and ratio > 1:
        reason = "that may be more than the critical batch size, which NoiseScaleCallback estimates"
    else:
        return
    size_in_words = "all samples of an iteration" if size is None else f"{size} samples"
    warnings.warn(
        f"A minibatch now has {size_in_words}; {reason}. Above it, training needs more environment steps than with "
        "fewer environments.",
        stacklevel=3,
    )


def _format(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, str) and value.startswith("lin_"):
        return f"lin_{float(value.removeprefix('lin_')):.4g}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_format, value))})"
    return str(value) if not isinstance(value, Mapping) else "…"
