"""
Hyper-parameters for another number of environments, with which training behaves the same as a function of environment
steps.

With ratio = new / old number of environments, the strategy ``"samples"`` divides ``n_steps`` by ratio: an iteration has
as many samples, and everything that is made of them stays what it was. Only where rollouts would be too short to look
ahead does an iteration grow, in minibatches of the same size. The strategy ``"paper"`` keeps ``n_steps`` and multiplies
both batches by ratio, the samples of an iteration and those of a gradient step, and adjusts the rest for it. It holds
for one policy epoch, for advantages that are not normalised per minibatch, and below the critical batch size.

Source of ``"paper"``: Hilton, Cobbe, Schulman 2022, https://arxiv.org/abs/2110.00641; ``"samples"`` is ours.
"""

import inspect
import math
import warnings
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, Literal, NamedTuple, get_args

import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.type_aliases import Schedule

from sb3_ppo_ewma._arguments import check_choice, check_integer, check_number, check_schedule, warn_caller
from sb3_ppo_ewma._parallel.process_group import place
from sb3_ppo_ewma.checkpointing.saving import SavedStateMixin
from sb3_ppo_ewma.ewma import (
    MOST_CENTERS_OF_MASS,
    center_of_mass_from_decay,
    decay_from_center_of_mass,
    decay_from_span,
    default_center_of_mass,
    span_from_decay,
)
from sb3_ppo_ewma.rollouts import default_aux_batch_size

Strategy = Literal["samples", "paper"]

_PAPER = "Hilton et al. 2022"
_SAME_SAMPLES = "as many samples"
# Hyper-parameters that the rules of each strategy read
_REQUIRED: dict[str, tuple[str, ...]] = {
    "samples": ("n_envs", "n_steps", "batch_size", "n_epochs", "gamma", "gae_lambda", "prox_decay", "advantage_decay"),
    "paper": ("n_envs", "n_steps", "batch_size", "n_epochs", "learning_rate", "prox_decay", "advantage_decay"),
}
# Those that only some algorithms have, or that need not be given
_OPTIONAL = ("n_policy_iterations", "aux_batch_size", "aux_learning_rate", "max_grad_norm")
# The shortest rollout, in steps
_SHORTEST_ROLLOUT = 8
# The same in 1/(1 − γλ) steps, the mean number of steps that an advantage looks ahead
_SHORTEST_LOOK_AHEAD = 2
# Hyper-parameters that data-parallel training divides between its processes, with their units
_DIVIDED = {"n_envs": "environments", "batch_size": "samples", "aux_batch_size": "samples"}
_COUNTED_IN_ITERATIONS = ("staleness", "n_policy_iterations")
# Arguments of the constructor that are not hyper-parameters
_NOT_HYPERPARAMETERS = ("policy", "env", "tuned_for_n_envs", "data_parallel", "_init_setup_model")
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


# === The paper's rules ===
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
    strategy: Strategy = "samples",
    adam_betas: bool = False,
    critical_batch_size: float | None = None,
) -> Rescaled:
    """
    Rescale hyper-parameters so that training behaves the same, as a function of environment steps, when the number of
    environments is multiplied by ``ratio``.

    ``strategy="samples"``, for any settings: ``n_steps`` is divided by ratio, nothing else changes. Rollouts do not
    become shorter than 8 steps (:func:`shortest_rollout`): an iteration then has more samples, in more minibatches of
    the same size. ``prox_decay`` keeps its age in gradient steps; below a fifth of the iteration it grows with the
    iteration, up to that fifth, and with stale data always. The span of ``advantage_decay`` (at least an iteration),
    ``n_policy_iterations``, ``staleness`` and ``max_policy_lag`` are divided by as much as the iteration has grown.
    With ``prox_decay=None`` or ``target_kl``, which are about whole iterations, iterations never grow; then, and where
    a number would not be whole, rollouts can be shorter, with a warning.

    ``strategy="paper"``, for one epoch: Adam's learning rate is multiplied by √ratio, SGD's by ratio. The centre of
    mass of ``prox_decay``, the span of ``advantage_decay``, ``n_policy_iterations`` and ``staleness`` are divided by
    ratio, ``max_grad_norm`` by √ratio. The auxiliary phase keeps its minibatches and its learning rate.

    ``"auto"`` and ``None``, which depend on the number of samples, become the numbers they stand for where that
    changes.

    >>> from sb3_ppo_ewma.batch_scaling import rescale, with_defaults
    >>> from sb3_ppo_ewma import PPOEWMA
    >>> lunar_lander = with_defaults(PPOEWMA, dict(n_envs=16, n_steps=1024, n_epochs=4, gamma=0.999, gae_lambda=0.98))
    >>> new = rescale(lunar_lander, 64 / 16).hyperparameters
    >>> new["n_envs"], new["n_steps"], new["batch_size"]
    (64, 256, 64)

    Source of ``"paper"``: Hilton et al. 2022, https://arxiv.org/abs/2110.00641, but for ``staleness`` and
    ``max_grad_norm``, whose rules are ours; ``"samples"``: ``n_envs.md`` in ``benchmarks/experiments/results``.

    :param hyperparameters: ``n_envs`` and keyword arguments of an algorithm, from :func:`settings_of` or
        :func:`with_defaults`. Learning rates are numbers, schedules or the zoo's ``lin_NUMBER``
    :param ratio: new / old number of environments
    :param strategy: ``"samples"`` or ``"paper"``
    :param adam_betas: with ``"paper"``, whether to adjust β₁ and β₂ of Adam, which the paper did not need; with PPG
        also those of the auxiliary phase, whose Adam has the policy's settings
    :param critical_batch_size: with ``"paper"``, critical batch size in samples, as
        :class:`~sb3_ppo_ewma.NoiseScaleCallback` estimates it, or ``None`` if unknown; minibatches above it cause a
        warning
    :return: new hyper-parameters and an explanation
    :raises TypeError: if an argument has the wrong type
    :raises ValueError: if a result is not a whole number, with the nearest numbers of environments that are possible;
        with ``"paper"`` also where there is no rule: for several policy epochs, advantages normalised per minibatch, no
        EWMA, ``target_kl``, an optimiser other than Adam and SGD, a schedule that cannot be scaled, an advantage span
        below one iteration
    """
    ratio = _checked_ratio(ratio)
    check_choice("strategy", strategy, get_args(Strategy))
    old = _checked_hyperparameters(hyperparameters, _REQUIRED[strategy])
    if strategy == "samples":
        if adam_betas or critical_batch_size is not None:
            name = "adam_betas" if adam_betas else "critical_batch_size"
            raise ValueError(f"{name} belongs to strategy='paper': strategy='samples' keeps the minibatches")
        changes = _keep_samples(old, ratio)
    else:
        _check_papers_conditions(old)
        if critical_batch_size is not None:
            check_number("critical_batch_size", critical_batch_size, 0)
        changes = _scale_batches(old, ratio, adam_betas)
        _warn_above_critical_batch_size({change.name: change.new for change in changes}, ratio, critical_batch_size)
    return Rescaled({**old, **{change.name: change.new for change in changes}}, tuple(changes))


def settings_of(model: BaseAlgorithm) -> dict[str, Any]:
    """
    :param model: model of one of this package's algorithms
    :return: ``n_envs`` and the keyword arguments that build the same model for other environments; in data-parallel
        training, those of a single process that does the work of all
    :raises TypeError: if ``model`` is of another class
    """
    if not isinstance(model, SavedStateMixin):
        raise TypeError(f"model must be one of this package's algorithms, got {type(model).__name__}")
    names = [name for name in inspect.signature(type(model)).parameters if name not in _NOT_HYPERPARAMETERS]
    settings = {"n_envs": model.n_envs, **{name: getattr(model, name) for name in names if hasattr(model, name)}}
    n_processes = place(model.data_parallel).n_processes
    totals = {name: settings[name] * n_processes for name in _DIVIDED if settings.get(name) is not None}
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
    if not (isinstance(algorithm, type) and issubclass(algorithm, SavedStateMixin)):
        raise TypeError(f"algorithm must be a class of this package's algorithms, got {algorithm!r}")
    parameters = inspect.signature(algorithm).parameters
    names = (*_REQUIRED["samples"], *_REQUIRED["paper"], *_OPTIONAL)
    defaults = {name: parameters[name].default for name in names if name in parameters}
    if not hyperparameters.get("normalize_advantage", True):
        defaults["advantage_decay"] = None  # as the constructor does
    return {"n_envs": 1, **defaults, **hyperparameters}


def _checked_ratio(ratio: Any) -> Fraction:
    if isinstance(ratio, bool) or not isinstance(ratio, int | float | Fraction):
        raise TypeError(f"ratio must be a positive number, new / old number of environments, got {ratio!r}")
    if not 0 < ratio < math.inf:
        raise ValueError(f"ratio must be positive and finite, got {ratio}")
    return Fraction(ratio).limit_denominator(_LARGEST_DENOMINATOR)


def _checked_hyperparameters(hyperparameters: Mapping[str, Any], required: tuple[str, ...]) -> dict[str, Any]:
    """
    :param hyperparameters: the user's argument
    :param required: names of those that the rules read
    :return: a copy
    :raises TypeError: if one of those has the wrong type
    :raises ValueError: if one is missing or out of its range
    """
    old = dict(hyperparameters)
    missing = [name for name in required if name not in old]
    if missing:
        raise ValueError(
            f"hyperparameters must have {', '.join(missing)}: with_defaults(algorithm, hyperparameters) adds what is "
            "not given"
        )
    for name in ("n_envs", "n_steps", "n_epochs"):
        check_integer(name, old[name], minimum=1)
    for name in ("batch_size", "n_policy_iterations", "aux_batch_size"):
        if old.get(name) is not None:
            check_integer(name, old[name], minimum=1)
    if old["prox_decay"] not in (None, "auto"):
        check_number("prox_decay", old["prox_decay"], 0, 1)
    if old["advantage_decay"] is not None:
        check_number("advantage_decay", old["advantage_decay"], 0, 1)
    return old


# === Strategy "samples" ===


def shortest_rollout(hyperparameters: Mapping[str, Any]) -> int:
    """
    Advantages look 1/(1 − γλ) steps ahead on average, but not beyond the end of their rollout. Training bears that down
    to 8 steps, also where advantages would look ahead further, and hardly below.

    Source: ``n_envs.md`` in ``benchmarks/experiments/results``.

    :param hyperparameters: with ``n_steps``, ``gamma`` and ``gae_lambda``
    :return: steps that a rollout should have at least: 8, or 2/(1 − γλ) or ``n_steps`` if that is less
    """
    for name in ("gamma", "gae_lambda"):
        check_number(name, hyperparameters[name], 0, 1, closed=True)
    forgotten = 1 - hyperparameters["gamma"] * hyperparameters["gae_lambda"]
    shortest = min(int(hyperparameters["n_steps"]), _SHORTEST_ROLLOUT)
    return shortest if forgotten * shortest <= _SHORTEST_LOOK_AHEAD else math.ceil(_SHORTEST_LOOK_AHEAD / forgotten)


def _why_not_to_grow(old: Mapping[str, Any]) -> str | None:
    """
    :param old: hyper-parameters
    :return: the hyper-parameter that is about whole iterations, so that they must keep their samples
    """
    if old["prox_decay"] is None:
        return "prox_decay=None"
    return None if old.get("target_kl") is None else f"target_kl={old['target_kl']}"


def _keep_samples(old: Mapping[str, Any], ratio: Fraction) -> list[Change]:
    n_envs = count("n_envs", old["n_envs"], ratio, "environments")
    n_steps = _n_steps_for(old, n_envs)
    if n_steps is None:
        raise ValueError(_why_not_whole(old, n_envs))
    n_samples = old["n_envs"] * old["n_steps"]
    growth = Fraction(n_envs * n_steps, n_samples)
    rule = f"÷ ratio: an iteration keeps its {n_samples} samples"
    if growth > 1:
        rule = f"as short as advantages allow: an iteration has {float(growth):.4g} times its {n_samples} samples"
    if n_steps < shortest_rollout(old):
        reason = _why_not_to_grow(old) or _counted_in_iterations(old)
        warn_caller(
            f"Rollouts of {n_envs} environments have {n_steps} steps, fewer than the {shortest_rollout(old)} that "
            f"training needs to go on as before, since {reason} keeps iterations as short"
        )
    changes = [
        Change("n_envs", old["n_envs"], n_envs, "× ratio", f"ratio {ratio}"),
        Change("n_steps", old["n_steps"], n_steps, rule, _SAME_SAMPLES),
    ]
    if old.get("use_sde") and old.get("sde_sample_freq", -1) < 0 and n_steps > old["n_steps"]:
        rule = "noise is drawn as often as with each rollout before"
        changes.append(Change("sde_sample_freq", old.get("sde_sample_freq", -1), old["n_steps"], rule, _SAME_SAMPLES))
    return changes if growth == 1 else [*changes, *_grow_iteration(old, growth)]


def _grow_iteration(old: Mapping[str, Any], growth: Fraction) -> list[Change]:
    """
    :param old: hyper-parameters
    :param growth: samples of an iteration, new / old
    :return: what is counted in iterations, or moves with them, for an iteration of more minibatches
    """
    n_samples = old["n_envs"] * old["n_steps"]
    size = _minibatch_size(old)
    changes = [Change("batch_size", old["batch_size"], size, "kept, in samples", _SAME_SAMPLES)]
    center = center_of_mass_from_decay(_decay_as_number(old))
    iteration = old["n_epochs"] * math.ceil(n_samples * growth / size)
    oldest = center * float(growth)
    new_center = oldest if _is_stale(old) else max(center, min(oldest, iteration / MOST_CENTERS_OF_MASS))
    rule = f"centre of mass {center:.4g} → {new_center:.4g} gradient steps: no clip far from the data"
    if new_center == center:
        rule = f"kept: a centre of mass of {center:.4g} gradient steps"
    changes.append(Change("prox_decay", old["prox_decay"], decay_from_center_of_mass(new_center), rule, _SAME_SAMPLES))
    if old["advantage_decay"] is not None:
        span = span_from_decay(old["advantage_decay"])
        new_span = max(span / float(growth), 1.0)
        rule = f"span ÷ growth, at least 1: {span:.4g} → {new_span:.4g} iterations"
        changes.append(
            Change("advantage_decay", old["advantage_decay"], decay_from_span(new_span), rule, _SAME_SAMPLES)
        )
    for name in _COUNTED_IN_ITERATIONS:
        if old.get(name):
            new = count(name, old[name], 1 / growth, "iterations")
            changes.append(Change(name, old[name], new, "÷ growth", _SAME_SAMPLES))
    if old.get("max_policy_lag"):
        new = max(1, math.floor(old["max_policy_lag"] / growth))
        changes.append(Change("max_policy_lag", old["max_policy_lag"], new, "÷ growth, at least 1", _SAME_SAMPLES))
    if "n_policy_iterations" in old:
        changes.append(_kept_aux_batch_size(old, n_samples, _SAME_SAMPLES))
    return changes


def _n_steps_for(old: Mapping[str, Any], n_envs: int) -> int | None:
    """
    :param old: hyper-parameters
    :param n_envs: new number of environments
    :return: length of a rollout with which all numbers are whole: as many samples as before; where that is too short,
        the shortest that is not, or else the longest; ``None`` if there is none
    """
    n_samples = old["n_envs"] * old["n_steps"]
    shortest = shortest_rollout(old)
    if n_samples >= n_envs * shortest or _why_not_to_grow(old):
        return n_samples // n_envs if n_samples % n_envs == 0 else None
    first = -(-n_samples // n_envs)
    possible = [n_steps for n_steps in range(first, old["n_steps"] + 1) if _is_whole(old, n_envs * n_steps)]
    long_enough = [n_steps for n_steps in possible if n_steps >= shortest]
    if not long_enough:
        return possible[-1] if possible else None
    # Of whole minibatches, as before, where that does not make rollouts twice as long
    size = _minibatch_size(old)
    rest = n_samples % size
    even = (n_steps for n_steps in long_enough if n_envs * n_steps % size == rest == 0 and n_steps < 2 * shortest)
    return next(even, long_enough[0])


def _is_whole(old: Mapping[str, Any], n_new_samples: int) -> bool:
    growth = Fraction(n_new_samples, old["n_envs"] * old["n_steps"])
    return all((old.get(name, 0) / growth).denominator == 1 for name in _COUNTED_IN_ITERATIONS)


def _why_not_whole(old: Mapping[str, Any], n_envs: int) -> str:
    n_samples = old["n_envs"] * old["n_steps"]
    origin = f"n_envs={old['n_envs']} times n_steps={old['n_steps']}"
    fixed = _why_not_to_grow(old)
    if n_samples < n_envs and fixed is not None:
        reason = f"{origin} are {n_samples} samples, fewer than environments, and with {fixed} an iteration cannot grow"
    elif n_samples >= n_envs * shortest_rollout(old) or fixed is not None:
        reason = f"{origin} are {n_samples} samples, which cannot be divided among {n_envs} environments"
    else:
        counts = _counted_in_iterations(old)
        reason = f"no n_steps up to {old['n_steps']} leaves {counts} whole for {n_envs} environments"
    smaller = next((n for n in range(n_envs - 1, 0, -1) if _n_steps_for(old, n) is not None), None)
    larger = next((n for n in range(n_envs + 1, 2 * n_envs + 1) if _n_steps_for(old, n) is not None), None)
    nearest = " and ".join(str(n) for n in (smaller, larger) if n is not None)
    return f"{reason}; nearest possible: {nearest}"


def _counted_in_iterations(old: Mapping[str, Any]) -> str:
    return " and ".join(f"{name}={old[name]}" for name in _COUNTED_IN_ITERATIONS if old.get(name))


def _minibatch_size(old: Mapping[str, Any]) -> int:
    n_samples = int(old["n_envs"] * old["n_steps"])
    return min(old["batch_size"] or n_samples, n_samples)


def _is_stale(old: Mapping[str, Any]) -> bool:
    return bool(old.get("staleness") or old.get("max_policy_lag"))


def _decay_as_number(old: Mapping[str, Any]) -> float:
    if old["prox_decay"] != "auto":
        return float(old["prox_decay"])
    n_samples = old["n_envs"] * old["n_steps"]
    center = default_center_of_mass(n_samples, old["batch_size"], old["n_epochs"], _is_stale(old))
    return decay_from_center_of_mass(center)


def _kept_aux_batch_size(old: Mapping[str, Any], n_samples: int, source: str) -> Change:
    # A phase keeps its number of samples, and so its minibatches and its learning rate.
    size = old.get("aux_batch_size")
    return Change(
        "aux_batch_size", size, default_aux_batch_size(n_samples) if size is None else size, "kept, as a number", source
    )


# === Strategy "paper" ===


def _check_papers_conditions(old: Mapping[str, Any]) -> None:
    """
    :param old: hyper-parameters
    :raises ValueError: if the paper's rules do not hold for them, with the reason
    """
    other = "; strategy='samples' has no such condition"
    if old["n_epochs"] != 1:
        raise ValueError(
            f"n_epochs={old['n_epochs']} cannot be rescaled with strategy='paper': with several policy epochs, "
            "training depends on how an iteration is divided into minibatches, which no other hyper-parameter "
            f"compensates for{other}"
        )
    if old["prox_decay"] is None:
        raise ValueError(
            "prox_decay=None cannot be rescaled with strategy='paper': without an EWMA, the proximal policy is the "
            f"behaviour policy, whose age in samples changes with the number of environments{other}"
        )
    if old["advantage_decay"] is None and old.get("normalize_advantage", True):
        raise ValueError(
            "advantage_decay=None cannot be rescaled with strategy='paper': it normalises advantages per minibatch, so "
            "that their scale depends on its size; use advantage_decay=0.0, which normalises per iteration, or "
            f"normalize_advantage=False{other}"
        )
    if old.get("target_kl") is not None:
        raise ValueError(
            f"target_kl={old['target_kl']} cannot be rescaled with strategy='paper': it ends an iteration at a "
            f"distance from the behaviour policy, whose age depends on the number of environments{other}"
        )


def _scale_batches(old: Mapping[str, Any], ratio: Fraction, adam_betas: bool) -> list[Change]:
    n_envs, batch_size = old["n_envs"], old["batch_size"]
    n_samples = n_envs * old["n_steps"]
    new_envs = count("n_envs", n_envs, ratio, "environments")
    changes = [Change("n_envs", n_envs, new_envs, "× ratio", f"ratio {ratio}")]
    if batch_size is not None:
        new_batch_size = count("batch_size", batch_size, ratio, "samples")
        changes.append(Change("batch_size", batch_size, new_batch_size, "× ratio", _PAPER))
    changes += _optimizer_changes(old, ratio, adam_betas)
    decay = _decay_as_number(old)
    new_decay = prox_decay(decay, float(ratio))
    centers = (
        f"centre of mass ÷ ratio: {center_of_mass_from_decay(decay):.4g} → "
        f"{center_of_mass_from_decay(new_decay):.4g} gradient steps"
    )
    changes.append(Change("prox_decay", old["prox_decay"], new_decay, centers, _PAPER))
    if old["advantage_decay"] is not None:
        new_decay = advantage_decay(old["advantage_decay"], float(ratio))
        spans = (
            f"span ÷ ratio: {span_from_decay(old['advantage_decay']):.4g} → {span_from_decay(new_decay):.4g} iterations"
        )
        changes.append(Change("advantage_decay", old["advantage_decay"], new_decay, spans, _PAPER))
    if old.get("staleness"):
        new_staleness = count("staleness", old["staleness"], 1 / ratio, "iterations")
        changes.append(Change("staleness", old["staleness"], new_staleness, "÷ ratio", "the same age in samples"))
    if "n_policy_iterations" in old:
        n_iterations = old["n_policy_iterations"]
        new_iterations = count("n_policy_iterations", n_iterations, 1 / ratio, "iterations")
        changes.append(Change("n_policy_iterations", n_iterations, new_iterations, "÷ ratio", _PAPER))
        changes.append(_kept_aux_batch_size(old, n_samples, _PAPER))
        if "aux_learning_rate" in old:
            rate = old["aux_learning_rate"]
            changes.append(Change("aux_learning_rate", rate, rate, "kept", _PAPER))
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
