"""
Batch size-invariance: hyper-parameters with which training behaves the same with another number of environments.

With a ratio = new number of environments / old one, both batches are multiplied by it: the samples of an iteration and
those of a gradient step. In the same number of environment steps there are then 1/ratio times as many iterations and
gradient steps. The learning rate makes up for it, and what is counted in iterations or gradient steps is divided by the
ratio, so that it stays the same in environment steps.

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
# What the rules depend on, and what they depend on where an algorithm has it
_NEEDED = ("n_envs", "n_steps", "batch_size", "n_epochs", "learning_rate", "prox_decay", "advantage_decay")
_OPTIONAL = ("n_policy_iterations", "aux_batch_size", "aux_learning_rate", "max_grad_norm")
# What the processes of a data-parallel training share, where an algorithm has it
_SHARED = {"n_envs": "environments", "batch_size": "samples", "aux_batch_size": "samples"}
# Arguments of the constructor that are no settings, or are given anew
_NO_SETTINGS = ("policy", "env", "_init_setup_model")
# What is built where no optimiser settings are given
_OUR_ADAM = {"eps": 1e-5, "fused": True}
# Of a ratio that is given as a floating point number
_LARGEST_DENOMINATOR = 2**20


class Change(NamedTuple):
    """
    What a rule did.

    :param name: of the hyper-parameter
    :param old: value
    :param new: value
    :param rule: in words
    :param source: of the rule
    """

    name: str
    old: Any
    new: Any
    rule: str
    source: str


class Rescaled(NamedTuple):
    """
    Hyper-parameters for another number of environments.

    :param hyperparameters: all of them
    :param changes: what the rules did, also where that is nothing
    """

    hyperparameters: dict[str, Any]
    changes: tuple[Change, ...]

    @property
    def explanation(self) -> str:
        """A table of name, old → new, rule and source."""
        rows = [
            (change.name, f"{_shown(change.old)} → {_shown(change.new)}", change.rule, change.source)
            for change in self.changes
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        return "\n".join(
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]) for row in rows
        )


class ScaledSchedule:
    """
    A schedule times a number; unlike a function of its own, it can be saved with a model.

    :param schedule: of the remaining progress
    :param factor: the number
    """

    def __init__(self, schedule: Schedule, factor: float) -> None:
        self.schedule, self.factor = schedule, factor

    def __call__(self, progress_remaining: float) -> float:
        return self.factor * self.schedule(progress_remaining)

    def __repr__(self) -> str:
        return f"{self.factor:.4g} * {self.schedule!r}"


# === Rules ===
# Of one quantity each. ratio = new batch / old batch


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
    :param norm: to which gradients are clipped
    :param ratio: new batch / old batch
    :return: norm/√ratio. Below the critical batch size a gradient is mostly noise, the mean of as many samples as a
        minibatch has, so its norm goes with one over the square root of their number. The rule is ours: the paper
        clips no gradients
    """
    return norm / math.sqrt(ratio)


def prox_decay(decay: float, ratio: float) -> float:
    """
    :param decay: β_prox, decay of the EWMA of the parameters per gradient step
    :param ratio: new batch / old batch
    :return: decay with the centre of mass 1/(1−β) − 1 divided by ratio, the same number of samples
    """
    return decay_from_center_of_mass(center_of_mass_from_decay(decay) / ratio)


def advantage_decay(decay: float, ratio: float) -> float:
    """
    :param decay: d, decay of the advantages' moments per iteration
    :param ratio: new batch / old batch
    :return: decay with the span 2/(1−d) − 1 divided by ratio, the same number of samples
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
    :param name: of the hyper-parameter, for the message
    :param number: of environments, samples or iterations
    :param ratio: new number / old number
    :param unit: what is counted, for the message
    :return: number·ratio
    :raises ValueError: if that is no whole number
    """
    result = number * ratio
    if result.denominator != 1:
        raise ValueError(f"{name}={number} times {ratio} is {float(result):.4g}, no whole number of {unit}")
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
    Hyper-parameters with which training behaves the same, as a function of environment steps, when the number of
    environments is multiplied by ``ratio``.

    Adam's learning rate is multiplied by √ratio (that of SGD by ratio); the centre of mass of ``prox_decay``, the span
    of ``advantage_decay``, ``n_policy_iterations`` and ``staleness`` are divided by it, ``max_grad_norm`` by √ratio;
    the auxiliary phase keeps its minibatches and its learning rate. ``"auto"`` and ``None``, which depend on the number
    of environments, are replaced by their numbers before.

    >>> import math
    >>> from sb3_ppo_ewma.batch_scaling import rescale
    >>> paper = dict(n_envs=256, n_steps=256, batch_size=8192, n_epochs=1, learning_rate=5e-4, prox_decay=8 / 9,
    ...              advantage_decay=0.0, n_policy_iterations=32, aux_batch_size=4096)
    >>> small = rescale(paper, 1 / 64).hyperparameters
    >>> small["n_envs"], small["batch_size"], small["n_policy_iterations"], round(small["learning_rate"], 7)
    (4, 128, 2048, 6.25e-05)

    Source: Hilton et al. 2022, https://arxiv.org/abs/2110.00641. The rules for ``staleness`` and ``max_grad_norm`` are
    ours.

    :param hyperparameters: ``n_envs`` and keyword arguments of an algorithm, as of :func:`settings_of` or completed by
        :func:`with_defaults`. Learning rates are numbers, schedules or the zoo's ``lin_NUMBER``
    :param ratio: new number of environments / old one
    :param adam_betas: adjust β₁ and β₂ of Adam as well, which the paper did not need; with PPG also those of the
        auxiliary phase, whose Adam has the policy's settings
    :param critical_batch_size: in samples, of :class:`~sb3_ppo_ewma.NoiseScaleCallback`, if it is known; above it there
        is no invariance
    :return: new hyper-parameters and an explanation
    :raises TypeError: if something has the wrong type
    :raises ValueError: where the rules do not hold: several policy epochs, advantages normalised per minibatch, no
        EWMA, ``target_kl``, another optimiser than Adam and SGD, a schedule that cannot be scaled, a result that is no
        whole number, an advantage span of less than an iteration
    """
    ratio = _checked_ratio(ratio)
    old = _checked(hyperparameters)
    if critical_batch_size is not None:
        check_number("critical_batch_size", critical_batch_size, 0)
    changes = list(_changes(old, ratio, adam_betas))
    _warn_of_critical_size({change.name: change.new for change in changes}, ratio, critical_batch_size)
    return Rescaled({**old, **{change.name: change.new for change in changes}}, tuple(changes))


def settings_of(model: BaseAlgorithm) -> dict[str, Any]:
    """
    :param model: of an algorithm of this package
    :return: ``n_envs`` and the keyword arguments with which the same model could be built for other environments; of a
        data-parallel training, those of one process that does the work of all
    :raises TypeError: if it is no such model
    """
    if not isinstance(model, EwmaMixin):
        raise TypeError(f"model must be one of this package's algorithms, got {type(model).__name__}")
    names = [name for name in inspect.signature(type(model)).parameters if name not in _NO_SETTINGS]
    settings = {"n_envs": model.n_envs, **{name: getattr(model, name) for name in names if hasattr(model, name)}}
    shared = {name: settings[name] * world_size() for name in _SHARED if settings.get(name) is not None}
    return {**settings, **shared}


def per_process(hyperparameters: Mapping[str, Any], n_processes: int) -> dict[str, Any]:
    """
    What each process of a data-parallel training is built with, so that together they do the same as one: the
    environments and the samples of a minibatch are divided between them.

    >>> from sb3_ppo_ewma.batch_scaling import per_process
    >>> per_process(dict(n_envs=64, n_steps=256, batch_size=2048), 4)
    {'n_envs': 16, 'n_steps': 256, 'batch_size': 512}

    :param hyperparameters: of all, ``n_envs`` and ``batch_size`` among them (see :func:`with_defaults`)
    :param n_processes: at least 1
    :return: of one
    :raises TypeError: if the number of processes is no integer
    :raises ValueError: if something cannot be divided, or there is no ``n_envs`` or ``batch_size``
    """
    check_integer("n_processes", n_processes, minimum=1)
    missing = [name for name in ("n_envs", "batch_size") if name not in hyperparameters]
    if missing:
        raise ValueError(f"hyperparameters must have {', '.join(missing)}: with_defaults() adds what is not given")
    parts = dict(hyperparameters)
    for name, unit in _SHARED.items():
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
    :param algorithm: class of this package
    :param hyperparameters: some of its keyword arguments, and perhaps ``n_envs`` (1 otherwise)
    :return: the same, completed with the defaults that the rules depend on
    :raises TypeError: if it is no such class
    """
    if not (isinstance(algorithm, type) and issubclass(algorithm, EwmaMixin)):
        raise TypeError(f"algorithm must be a class of this package's algorithms, got {algorithm!r}")
    parameters = inspect.signature(algorithm).parameters
    defaults = {name: parameters[name].default for name in (*_NEEDED, *_OPTIONAL) if name in parameters}
    if not hyperparameters.get("normalize_advantage", True):
        defaults["advantage_decay"] = None  # as the constructor does
    return {"n_envs": 1, **defaults, **hyperparameters}


def _checked_ratio(ratio: Any) -> Fraction:
    if isinstance(ratio, bool) or not isinstance(ratio, int | float | Fraction):
        raise TypeError(f"ratio must be a positive number, new / old number of environments, got {ratio!r}")
    if not 0 < ratio < math.inf:
        raise ValueError(f"ratio must be positive and finite, got {ratio}")
    return Fraction(ratio).limit_denominator(_LARGEST_DENOMINATOR)


def _checked(hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """
    :param hyperparameters: as given
    :return: the same as a dictionary
    :raises ValueError: with the reason why they cannot be rescaled
    """
    old = dict(hyperparameters)
    missing = [name for name in _NEEDED if name not in old]
    if missing:
        raise ValueError(
            f"hyperparameters must have {', '.join(missing)}: with_defaults(algorithm, hyperparameters) adds what is "
            "not given"
        )
    for name in ("n_envs", "n_steps", "n_epochs"):
        check_integer(name, old[name], minimum=1)
    if old["n_epochs"] != 1:
        raise ValueError(
            f"n_epochs={old['n_epochs']} cannot be rescaled: with several policy epochs, training depends on how the "
            "samples of an iteration are divided, which no other hyper-parameter makes up for; use n_epochs=1"
        )
    if old["prox_decay"] is None:
        raise ValueError(
            "prox_decay=None cannot be rescaled: without an EWMA, the proximal policy is the behaviour policy, whose "
            "age is an iteration, however many samples that has; use prox_decay='auto' or a number"
        )
    if old["advantage_decay"] is None and old.get("normalize_advantage", True):
        raise ValueError(
            "advantage_decay=None cannot be rescaled: it normalises advantages per minibatch, so that their scale "
            "depends on how many samples that has; use advantage_decay=0.0, which normalises per iteration, or "
            "normalize_advantage=False"
        )
    if old.get("target_kl") is not None:
        raise ValueError(
            f"target_kl={old['target_kl']} cannot be rescaled: it ends an iteration by the distance from the behaviour "
            "policy, whose age depends on the number of environments; use target_kl=None"
        )
    return old


def _changes(old: Mapping[str, Any], ratio: Fraction, adam_betas: bool) -> list[Change]:
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
        changes += _phase_changes(old, ratio, n_samples)
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
    changes = [Change("learning_rate", rate, _scaled(rate, rule(1.0, float(ratio))), name, _PAPER)]
    if adam_betas and is_adam:
        betas = kwargs.get("betas", (0.9, 0.999))
        new_betas = tuple(adam_beta(beta, float(ratio)) for beta in betas)
        new_kwargs = {**policy_kwargs, "optimizer_kwargs": {**(kwargs or _OUR_ADAM), "betas": new_betas}}
        rule_in_words = f"Adam's betas to the power of ratio: {_shown(betas)} → {_shown(new_betas)}"
        changes.append(Change("policy_kwargs", old.get("policy_kwargs"), new_kwargs, rule_in_words, _PAPER))
    return changes


def _phase_changes(old: Mapping[str, Any], ratio: Fraction, n_samples: int) -> list[Change]:
    n_iterations = old["n_policy_iterations"]
    check_integer("n_policy_iterations", n_iterations, minimum=1)
    new_iterations = count("n_policy_iterations", n_iterations, 1 / ratio, "iterations")
    changes = [Change("n_policy_iterations", n_iterations, new_iterations, "÷ ratio", _PAPER)]
    # The phase has the same samples as before, and nothing of it changes.
    size = old.get("aux_batch_size")
    new_size = default_aux_batch_size(n_samples) if size is None else size
    changes.append(Change("aux_batch_size", size, new_size, "kept, as a number", _PAPER))
    if "aux_learning_rate" in old:
        rate = old["aux_learning_rate"]
        changes.append(Change("aux_learning_rate", rate, rate, "kept", _PAPER))
    return changes


def _scaled(learning_rate: Any, factor: float) -> Any:
    """
    :param learning_rate: number, schedule or ``lin_NUMBER``
    :param factor: to multiply it by
    :return: the same kind
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


def _warn_of_critical_size(new: Mapping[str, Any], ratio: Fraction, critical: float | None) -> None:
    size = new.get("batch_size")
    if critical is not None and size is not None and size > critical:
        reason = f"the critical batch size is {critical:.4g}"
    elif critical is None and ratio > 1:
        reason = "that may be more than the critical batch size, which NoiseScaleCallback estimates"
    else:
        return
    size_in_words = "as many samples as an iteration has" if size is None else f"{size} samples"
    warnings.warn(
        f"A minibatch has now {size_in_words}; {reason}. Above it, training is slower than with fewer environments, as "
        "a function of environment steps.",
        stacklevel=3,
    )


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, str) and value.startswith("lin_"):
        return f"lin_{float(value.removeprefix('lin_')):.4g}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_shown, value))})"
    return str(value) if not isinstance(value, Mapping) else "…"
