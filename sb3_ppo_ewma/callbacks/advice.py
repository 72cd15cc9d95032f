"""What the log of a run advises to change, said in one line each by a callback."""

import difflib
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback

from sb3_ppo_ewma._arguments import check_integer, check_number


class Iteration(NamedTuple):
    """
    What one training logged, and what it is judged by. Quantities are named as in the log, without ``train/``.

    :param log: quantities of this training, without those that are missing or NaN
    :param previous: those of the training before, empty at first
    :param first: of each quantity, its first value
    :param progress: share of the run that is done, in [0, 1]
    :param n_epochs: number of policy epochs
    :param max_entropy: of the actions in nats, ``None`` for continuous ones, whose entropy has no bounds
    """

    log: Mapping[str, float]
    previous: Mapping[str, float]
    first: Mapping[str, float]
    progress: float = 0.0
    n_epochs: int = 1
    max_entropy: float | None = None


class Finding(NamedTuple):
    """
    One thing that can be wrong, and what helps. It is found when ``measure`` is beyond the threshold in at least
    ``share`` of the last ``n_windows`` · patience iterations that have a measure, or of all, if they are as many.

    :param name: in the log, below ``advice/``
    :param what: is measured, in words
    :param measure: of an iteration; ``None``: it says nothing
    :param is_high: whether values above the threshold are wrong, or those below
    :param threshold: by default
    :param allowed: smallest and largest threshold
    :param advice: which parameter to change, and in which direction
    :param share: of the iterations
    :param n_windows: length of the observation, in units of the patience
    :param of_all: whether all iterations of the run count
    """

    name: str
    what: str
    measure: Callable[[Iteration], float | None]
    is_high: bool
    threshold: float
    allowed: tuple[float, float]
    advice: str
    share: float = 0.5
    n_windows: int = 1
    of_all: bool = False

    def wrong(self, values: Sequence[float], threshold: float) -> list[float]:
        """
        :param values: of the iterations
        :param threshold: in place of the default
        :return: those beyond the threshold
        """
        return [value for value in values if (value > threshold if self.is_high else value < threshold)]

    def is_found(self, values: Sequence[float], threshold: float, patience: int) -> bool:
        """
        :param values: of the iterations that count
        :param threshold: in place of the default
        :param patience: number of iterations
        :return: whether there are enough of them, and enough beyond the threshold
        """
        is_enough = len(values) >= self.n_windows * patience
        return is_enough and len(self.wrong(values, threshold)) >= self.share * len(values)

    def window(self, patience: int) -> deque[float]:
        """
        :param patience: number of iterations
        :return: for the values that count
        """
        return deque(maxlen=None if self.of_all else self.n_windows * patience)


# What is read of the log
_QUANTITIES = (
    "learning_rate", "clip_range", "clip_fraction", "advantage_std", "importance_cap_fraction", "importance_ess",
    "approx_kl", "approx_kl_prox", "entropy_loss", "std", "explained_variance",
)  # fmt: skip
# Shares of the largest entropy, of the first standard deviation
COLLAPSED_ENTROPY, COLLAPSED_STD = 0.05, 0.01
# For what is usual in the first iterations of good runs, and now and then later
_SLOW: Mapping[str, Any] = {"share": 0.8, "n_windows": 3}


def _logged(name: str) -> Callable[[Iteration], float | None]:
    return lambda iteration: iteration.log.get(name)


def _entropy_left(iteration: Iteration) -> float | None:
    if not iteration.max_entropy or "entropy_loss" not in iteration.log:
        return None
    return -iteration.log["entropy_loss"] / iteration.max_entropy


def _std_left(iteration: Iteration) -> float | None:
    if "std" not in iteration.log or iteration.first["std"] <= 0:
        return None
    return iteration.log["std"] / iteration.first["std"]


def _in_first_half(measure: Callable[[Iteration], float | None]) -> Callable[[Iteration], float | None]:
    return lambda iteration: measure(iteration) if iteration.progress <= 0.5 else None


def _has_decayed(iteration: Iteration, name: str) -> bool:
    return name in iteration.log and iteration.log[name] < iteration.first[name] / 2


def _clip_fraction_of_large_steps(iteration: Iteration) -> float | None:
    # A schedule that ends at 0 makes small steps on purpose, a policy that is almost deterministic can make no others.
    entropy_left, std_left = _entropy_left(iteration), _std_left(iteration)
    has_collapsed = (entropy_left is not None and entropy_left < COLLAPSED_ENTROPY) or (
        std_left is not None and std_left < COLLAPSED_STD
    )
    return None if _has_decayed(iteration, "learning_rate") or has_collapsed else iteration.log.get("clip_fraction")


def _clip_fraction_of_wide_clip(iteration: Iteration) -> float | None:
    # Every step leaves a clip range that ends at 0.
    return None if _has_decayed(iteration, "clip_range") else iteration.log.get("clip_fraction")


def _clip_fraction_of_one_epoch(iteration: Iteration) -> float | None:
    return _clip_fraction_of_wide_clip(iteration) if iteration.n_epochs == 1 else None


def _clip_fraction_of_epochs(iteration: Iteration) -> float | None:
    return _clip_fraction_of_wide_clip(iteration) if iteration.n_epochs > 1 else None


def _advantage_std_change(iteration: Iteration) -> float | None:
    if "advantage_std" not in iteration.log or "advantage_std" not in iteration.previous:
        return None
    low, high = sorted((iteration.log["advantage_std"], iteration.previous["advantage_std"]))
    if low > 0:
        return high / low
    return math.inf if high > 0 else 1.0


def _kl(iteration: Iteration) -> float | None:
    # SB3's algorithms have no proximal policy but the behaviour policy.
    return iteration.log.get("approx_kl_prox", iteration.log.get("approx_kl"))


# The first four are the paper's (§6.2), where "far" below 1 % is here a tenth of it, far above 10 and 20 % twice that.
# docs/advice.md has the reasons for the others.
FINDINGS = (
    Finding(
        "clip_fraction_low",
        "the clip fraction",
        _clip_fraction_of_large_steps,
        is_high=False,
        threshold=0.001,
        allowed=(0, 1),
        advice="tune learning_rate first (up, where approx_kl is small too), then enlarge the rollouts (n_steps, more "
        "environments) or, with an EWMA, raise prox_decay",
        **_SLOW,
    ),
    Finding(
        "clip_fraction_high_1_epoch",
        "the clip fraction with one epoch",
        _clip_fraction_of_one_epoch,
        is_high=True,
        threshold=0.2,
        allowed=(0, 1),
        advice="lower learning_rate",
    ),
    Finding(
        "clip_fraction_high",
        "the clip fraction with several epochs",
        _clip_fraction_of_epochs,
        is_high=True,
        threshold=0.4,
        allowed=(0, 1),
        advice="lower learning_rate, begin with n_epochs=1",
    ),
    Finding(
        "advantage_std_swings",
        "the factor between successive standard deviations of the advantages",
        _advantage_std_change,
        is_high=True,
        threshold=10.0,
        allowed=(1, math.inf),
        advice="normalise over more iterations, raise advantage_decay (from None or 0 to 0.8, say)",
    ),
    Finding(
        "importance_cap",
        "the share of samples at the importance-ratio cap",
        _logged("importance_cap_fraction"),
        is_high=True,
        threshold=0.001,
        allowed=(0, 1),
        advice="the data is too old for this policy, lower staleness, learning_rate or n_epochs, or raise prox_decay",
    ),
    Finding(
        "importance_ess_low",
        "the effective share of the samples of a minibatch",
        _logged("importance_ess"),
        is_high=False,
        threshold=0.5,
        allowed=(0, 1),
        advice="a few samples make the gradient, lower staleness, learning_rate or n_epochs, or raise prox_decay",
    ),
    Finding(
        "kl_high",
        "the KL divergence from the proximal policy",
        _kl,
        is_high=True,
        threshold=0.2,
        allowed=(0, math.inf),
        advice="lower learning_rate or n_epochs, or raise kl_coef",
    ),
    Finding(
        "entropy_collapse",
        "the entropy, as a share of the largest possible,",
        _in_first_half(_entropy_left),
        is_high=False,
        threshold=COLLAPSED_ENTROPY,
        allowed=(0, 1),
        advice="where the return no longer rises, raise ent_coef or lower learning_rate",
    ),
    Finding(
        "std_collapse",
        "the standard deviation of the actions, as a share of the first,",
        _in_first_half(_std_left),
        is_high=False,
        threshold=COLLAPSED_STD,
        allowed=(0, 1),
        advice="where the return no longer rises, raise ent_coef or lower learning_rate",
    ),
    Finding(
        "explained_variance_low",
        "the explained variance of the returns",
        _logged("explained_variance"),
        is_high=False,
        threshold=0.01,
        allowed=(-math.inf, 1),
        advice="the critic learns nothing, normalise rewards (VecNormalize), or raise vf_coef or n_epochs_value",
        of_all=True,  # The returns of a solved task may be too much the same to be explained.
        **_SLOW,
    ),
)


class AdviceCallback(BaseCallback):
    """
    Watches what PPO, PPO-EWMA and PPG log of training. Where something is wrong for several iterations, it says once
    what the paper advises (§6.2; ``docs/advice.md`` has what it does not cover), and logs ``advice/NAME`` = 1 from then
    on. Works with any SB3 algorithm, on what it logs.

    Source: Hilton, Cobbe, Schulman 2022, https://arxiv.org/abs/2110.00641, §6.2

    >>> from sb3_ppo_ewma import PPOEWMA, AdviceCallback
    >>> callback = AdviceCallback(patience=2, thresholds={"clip_fraction_low": 0.002, "explained_variance_low": None})
    >>> model = PPOEWMA("MlpPolicy", "CartPole-v1", n_steps=64, learning_rate=0.0).learn(6 * 64, callback)
    Advice after 384 steps: the clip fraction is 0 (below 0.002 in 6 of 6 iterations): tune learning_rate first (up, \
where approx_kl is small too), then enlarge the rollouts (n_steps, more environments) or, with an EWMA, raise \
prox_decay.

    :param patience: number of iterations that are observed before something is said, thrice that for some findings
    :param thresholds: by name of a finding in ``FINDINGS``, in place of its default; ``None``: it is not looked for
    :param verbose: 0: only log
    :raises TypeError: for a value of the wrong type
    :raises ValueError: for an unknown finding or a value out of its range
    """

    rank_0_only = True  # of a data-parallel training, whose log it is

    def __init__(
        self, patience: int = 10, thresholds: Mapping[str, float | None] | None = None, verbose: int = 1
    ) -> None:
        check_integer("patience", patience, minimum=1)
        check_integer("verbose", verbose, minimum=0)
        super().__init__(verbose)
        self.patience = patience
        self.thresholds = _all_thresholds(thresholds)
        # What was said, by name
        self.found: dict[str, str] = {}
        self._n_updates: float | None = None
        self._start_afresh()

    def _start_afresh(self) -> None:
        self.found.clear()
        self._first: dict[str, float] = {}
        self._previous: dict[str, float] = {}
        self._measures = {finding.name: finding.window(self.patience) for finding in FINDINGS}

    def _on_training_start(self) -> None:
        if self.model.num_timesteps == 0:
            self._start_afresh()
        # What a logger still has of an earlier learn() was looked at then.
        self._n_updates = self.logger.name_to_value.get("train/n_updates")

    # SB3 writes what training logged, and forgets it, after the next rollout.
    def _on_rollout_start(self) -> None:
        self._look()

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        self._look()

    def _look(self) -> None:
        values = self.logger.name_to_value
        n_updates = values.get("train/n_updates")
        if n_updates is not None and n_updates != self._n_updates:
            self._n_updates = n_updates
            log = {name: float(values[f"train/{name}"]) for name in _QUANTITIES if f"train/{name}" in values}
            self._judge({name: value for name, value in log.items() if not math.isnan(value)})
        for name in self.found:
            self.logger.record(f"advice/{name}", 1)

    def _judge(self, log: dict[str, float]) -> None:
        self._first = {**log, **self._first}
        iteration = Iteration(
            log,
            self._previous,
            self._first,
            progress=1 - self.model._current_progress_remaining,
            n_epochs=getattr(self.model, "n_epochs", 1),
            max_entropy=_max_entropy(self.model.action_space),
        )
        self._previous = log
        for finding in FINDINGS:
            measure, threshold = finding.measure(iteration), self.thresholds[finding.name]
            if measure is None or threshold is None or finding.name in self.found:
                continue
            values = self._measures[finding.name]
            values.append(measure)
            if finding.is_found(values, threshold, self.patience):
                self._say(finding, values, threshold)

    def _say(self, finding: Finding, values: Sequence[float], threshold: float) -> None:
        wrong = finding.wrong(values, threshold)
        seen = f"{np.median(wrong):.3g} ({'above' if finding.is_high else 'below'} {threshold:g}"
        sentence = (
            f"Advice after {self.model.num_timesteps} steps: {finding.what} is {seen} in {len(wrong)} of {len(values)} "
            f"iterations): {finding.advice}."
        )
        self.found[finding.name] = sentence
        if self.verbose >= 1:
            print(sentence)


def _max_entropy(space: spaces.Space[Any]) -> float | None:
    if isinstance(space, spaces.Discrete):
        return math.log(space.n)
    if isinstance(space, spaces.MultiDiscrete):
        return float(np.log(space.nvec).sum())
    return int(np.prod(space.shape)) * math.log(2) if isinstance(space, spaces.MultiBinary) else None


def _all_thresholds(changed: Mapping[str, float | None] | None) -> dict[str, float | None]:
    """
    :return: threshold of every finding
    """
    if changed is not None and not isinstance(changed, Mapping):
        raise TypeError(f"thresholds must be numbers or None by name of a finding, or None, got {changed!r}")
    thresholds: dict[str, float | None] = {finding.name: finding.threshold for finding in FINDINGS}
    for name, threshold in (changed or {}).items():
        if name not in thresholds:
            close = difflib.get_close_matches(str(name), thresholds, n=1)
            hint = f"Did you mean {close[0]!r}?" if close else f"There are {', '.join(thresholds)}."
            raise ValueError(f"thresholds has no finding {name!r}. {hint}")
        (allowed,) = (finding.allowed for finding in FINDINGS if finding.name == name)
        if threshold is not None:
            check_number(f"the threshold of {name}", threshold, *allowed, closed=True)
        thresholds[name] = threshold
    return thresholds
