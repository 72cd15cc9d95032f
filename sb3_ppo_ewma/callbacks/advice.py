"""A callback that watches the training log and prints which hyperparameter to change when a value stays wrong."""

import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback

from sb3_ppo_ewma._arguments import check_integer, check_number


class Finding(NamedTuple):
    """
    A condition on one quantity of the log, and what to change when it persists.

    :param name: key in the log, after ``advice/``
    :param quantity: key in ``train/``, or of a quantity that :func:`_quantities` derives
    :param is_high: ``True``: values above the threshold are wrong; ``False``: values below it
    :param threshold: default threshold
    :param bounds: smallest and largest threshold that a user may set
    :param subject: the quantity in words
    :param advice: which parameter to change, and in which direction
    :param ignores: takes the quantities of an iteration; ``True`` leaves the iteration out
    :param is_slow: 80 % of 3 · patience iterations must be wrong, instead of 50 % of patience
    :param whole_run: count all iterations of the run, not only the latest
    """

    name: str
    quantity: str
    is_high: bool
    threshold: float
    bounds: tuple[float, float]
    subject: str
    advice: str
    ignores: Callable[[Mapping[str, float]], bool] = lambda _: False
    is_slow: bool = False
    whole_run: bool = False


# Values of train/ that findings are based on
_LOGGED = (
    "learning_rate", "clip_range", "clip_fraction", "advantage_std", "importance_cap_fraction", "importance_ess",
    "approx_kl", "approx_kl_prox", "entropy_loss", "std", "explained_variance",
)  # fmt: skip
_COLLAPSED_ENTROPY, _COLLAPSED_STD = 0.05, 0.01  # shares of the largest entropy, of the first standard deviation


def _makes_small_steps(quantities: Mapping[str, float]) -> bool:
    # A learning rate that decays to 0 makes small steps on purpose; a nearly deterministic policy cannot make others.
    return (
        quantities.get("learning_rate_share", 1) < 0.5
        or quantities.get("entropy_share", 1) < _COLLAPSED_ENTROPY
        or quantities.get("std_share", 1) < _COLLAPSED_STD
    )


def _has_small_clip_range(quantities: Mapping[str, float]) -> bool:
    # Every step leaves a clip range that decays to 0.
    return quantities.get("clip_range_share", 1) < 0.5


def _is_second_half(quantities: Mapping[str, float]) -> bool:
    return quantities["progress"] > 0.5


_OLD_DATA = "lower staleness, learning_rate or n_epochs, or raise prox_decay"
_COLLAPSE = "where the return no longer rises, raise ent_coef or lower learning_rate"
# The first four are the paper's (§6.2); docs/advice.md gives the reasons for all thresholds.
FINDINGS = (
    Finding(
        "clip_fraction_low", "clip_fraction", False, 0.001, (0, 1), "the clip fraction",
        "tune learning_rate first (up, where approx_kl is small too), then enlarge the rollouts (n_steps, more "
        "environments) or, with an EWMA, raise prox_decay",
        ignores=_makes_small_steps, is_slow=True,
    ),
    Finding(
        "clip_fraction_high_1_epoch", "clip_fraction", True, 0.2, (0, 1), "the clip fraction with one epoch",
        "lower learning_rate",
        ignores=lambda quantities: quantities["n_epochs"] > 1 or _has_small_clip_range(quantities),
    ),
    Finding(
        "clip_fraction_high", "clip_fraction", True, 0.4, (0, 1), "the clip fraction with several epochs",
        "lower learning_rate, begin with n_epochs=1",
        ignores=lambda quantities: quantities["n_epochs"] == 1 or _has_small_clip_range(quantities),
    ),
    Finding(
        "advantage_std_swings", "advantage_std_factor", True, 10.0, (1, math.inf),
        "the factor between successive standard deviations of the advantages",
        "normalise over more iterations, raise advantage_decay (from None or 0 to 0.8, say)",
    ),
    Finding(
        "importance_cap", "importance_cap_fraction", True, 0.001, (0, 1),
        "the share of samples at the importance-ratio cap",
        f"the data is too old for this policy, {_OLD_DATA}",
    ),
    Finding(
        "importance_ess_low", "importance_ess", False, 0.5, (0, 1),
        "the effective share of the samples of a minibatch",
        f"a few samples make the gradient, {_OLD_DATA}",
    ),
    Finding(
        "kl_high", "kl", True, 0.2, (0, math.inf), "the KL divergence from the proximal policy",
        "lower learning_rate or n_epochs, or raise kl_coef",
    ),
    Finding(
        "entropy_collapse", "entropy_share", False, _COLLAPSED_ENTROPY, (0, 1),
        "the entropy, as a share of the largest possible,", _COLLAPSE, ignores=_is_second_half,
    ),
    Finding(
        "std_collapse", "std_share", False, _COLLAPSED_STD, (0, 1),
        "the standard deviation of the actions, as a share of the first,", _COLLAPSE, ignores=_is_second_half,
    ),
    Finding(
        "explained_variance_low", "explained_variance", False, 0.01, (-math.inf, 1),
        "the explained variance of the returns",
        "the critic learns nothing, normalise rewards (VecNormalize), or raise vf_coef or n_epochs_value",
        is_slow=True, whole_run=True,  # on a solved task all returns may be equal, and nothing is left to explain
    ),
)  # fmt: skip


class AdviceCallback(BaseCallback):
    """
    Reads the training log of PPO, PPO-EWMA, PPG or any other SB3 algorithm. When a value has been wrong for several
    iterations, prints once what to change, and logs ``advice/NAME`` = 1 from then on. The advice is the paper's where
    it gives any (§6.2), ours elsewhere (``docs/advice.md``).

    Source: Hilton, Cobbe, Schulman 2022, https://arxiv.org/abs/2110.00641, §6.2

    >>> from sb3_ppo_ewma import PPOEWMA, AdviceCallback
    >>> callback = AdviceCallback(patience=2, thresholds={"clip_fraction_low": 0.002, "explained_variance_low": None})
    >>> model = PPOEWMA("MlpPolicy", "CartPole-v1", n_steps=64, learning_rate=0.0).learn(6 * 64, callback)
    Advice after 384 steps: the clip fraction is 0 (below 0.002 in 6 of 6 iterations): tune learning_rate first (up, \
where approx_kl is small too), then enlarge the rollouts (n_steps, more environments) or, with an EWMA, raise \
prox_decay.

    :param patience: number of iterations to observe before printing advice; three times that for some findings
    :param thresholds: thresholds by name of a finding in ``FINDINGS``, replacing the defaults; ``None`` switches the
        finding off
    :param verbose: 0: only log
    :raises TypeError: for a value of the wrong type
    :raises ValueError: for an unknown finding or a value out of its range
    """

    rank_0_only = True  # only rank 0 of a data-parallel training has a log

    def __init__(
        self, patience: int = 10, thresholds: Mapping[str, float | None] | None = None, verbose: int = 1
    ) -> None:
        check_integer("patience", patience, minimum=1)
        check_integer("verbose", verbose, minimum=0)
        super().__init__(verbose)
        self.patience = patience
        self.thresholds = _with_default_thresholds(thresholds)
        self.found: dict[str, str] = {}  # printed sentences by name of the finding
        self._last_n_updates: float | None = None
        self._max_entropy: float | None = None
        self._forget_run()

    def _forget_run(self) -> None:
        self.found.clear()
        self._first: dict[str, float] = {}
        self._previous: dict[str, float] = {}
        self._values: dict[str, list[float]] = {finding.name: [] for finding in FINDINGS}

    def _on_training_start(self) -> None:
        if self.model.num_timesteps == 0:
            self._forget_run()
        # The logger may still hold values of an earlier learn().
        self._last_n_updates = self.logger.name_to_value.get("train/n_updates")
        self._max_entropy = _max_entropy(self.model.action_space, None)

    # SB3 writes and clears the values of train() after the next rollout.
    def _on_rollout_start(self) -> None:
        self._check_log()

    def _on_step(self) -> bool:
        return True

    # The next rollout forgets the masks before the log is complete.
    def _on_rollout_end(self) -> None:
        masks = getattr(getattr(self.model, "rollout_buffer", None), "action_masks", None)
        self._max_entropy = _max_entropy(self.model.action_space, masks)

    def _on_training_end(self) -> None:
        self._check_log()

    def _check_log(self) -> None:
        values = self.logger.name_to_value
        n_updates = values.get("train/n_updates")
        if n_updates is not None and n_updates != self._last_n_updates:
            self._last_n_updates = n_updates
            log = {name: float(values[f"train/{name}"]) for name in _LOGGED if f"train/{name}" in values}
            self._check_findings({name: value for name, value in log.items() if not math.isnan(value)})
        for name in self.found:
            self.logger.record(f"advice/{name}", 1)

    def _check_findings(self, log: Mapping[str, float]) -> None:
        self._first = {**log, **self._first}
        quantities = _quantities(log, self._previous, self._first, self.model, self._max_entropy)
        self._previous = dict(log)
        for finding in FINDINGS:
            threshold = self.thresholds[finding.name]
            is_missing = finding.quantity not in quantities or finding.ignores(quantities)
            if threshold is None or finding.name in self.found or is_missing:
                continue
            self._values[finding.name].append(quantities[finding.quantity])
            share, n_required = (0.8, 3 * self.patience) if finding.is_slow else (0.5, self.patience)
            values = self._values[finding.name][0 if finding.whole_run else -n_required :]
            wrong = [value for value in values if (value > threshold if finding.is_high else value < threshold)]
            if len(values) >= n_required and len(wrong) >= share * len(values):
                limit = f"{'above' if finding.is_high else 'below'} {threshold:g}"
                self.found[finding.name] = (
                    f"Advice after {self.model.num_timesteps} steps: {finding.subject} is {np.median(wrong):.3g} "
                    f"({limit} in {len(wrong)} of {len(values)} iterations): {finding.advice}."
                )
                if self.verbose >= 1:
                    print(self.found[finding.name])


def _quantities(
    log: Mapping[str, float],
    previous: Mapping[str, float],
    first: Mapping[str, float],
    model: BaseAlgorithm,
    max_entropy: float | None,
) -> dict[str, float]:
    """
    :param log: logged values of this iteration, without NaN
    :param previous: logged values of the iteration before, empty at first
    :param first: the first logged value of every quantity
    :param model: the model in training
    :param max_entropy: largest entropy of its policy, in nats, ``None``: there is no largest
    :return: the logged values and those derived from them
    """
    n_epochs = getattr(model, "n_epochs", 1)  # A2C and off-policy algorithms have none
    quantities = {**log, "progress": 1 - model._current_progress_remaining, "n_epochs": n_epochs}
    for name in ("learning_rate", "clip_range", "std"):
        if name in log and first[name] > 0:
            quantities[f"{name}_share"] = log[name] / first[name]
    if "entropy_loss" in log and max_entropy:
        quantities["entropy_share"] = -log["entropy_loss"] / max_entropy
    if "advantage_std" in log and "advantage_std" in previous:
        low, high = sorted((log["advantage_std"], previous["advantage_std"]))
        quantities["advantage_std_factor"] = high / low if low > 0 else (math.inf if high > 0 else 1.0)
    if "approx_kl" in log or "approx_kl_prox" in log:  # SB3's algorithms have no proximal policy
        quantities["kl"] = log["approx_kl_prox"] if "approx_kl_prox" in log else log["approx_kl"]
    return quantities


def _max_entropy(space: spaces.Space[Any], masks: np.ndarray | None) -> float | None:
    """
    :param space: action space
    :param masks: (…, n) masks of a rollout, True for valid values of all actions one after the other; ``None``: all are
        valid
    :return: entropy of the policy that takes all valid values equally often, in nats, averaged over the rollout;
        ``None`` for continuous actions
    """
    if isinstance(space, spaces.Discrete):
        sizes = [int(space.n)]
    elif isinstance(space, spaces.MultiDiscrete):
        sizes = [int(size) for size in space.nvec.flat]
    elif isinstance(space, spaces.MultiBinary):
        sizes = [2] * int(np.prod(space.shape))
    else:
        return None
    if masks is None:
        return float(np.log(sizes).sum())
    of_actions = np.split(np.asarray(masks, dtype=bool), np.cumsum(sizes)[:-1], axis=-1)
    n_valid = [of_action.sum(axis=-1) for of_action in of_actions]
    return float(sum(np.log(np.maximum(count, 1)).mean() for count in n_valid))


def _with_default_thresholds(changed: Mapping[str, float | None] | None) -> dict[str, float | None]:
    if changed is not None and not isinstance(changed, Mapping):
        raise TypeError(f"thresholds must be numbers or None by name of a finding, or None, got {changed!r}")
    bounds = {finding.name: finding.bounds for finding in FINDINGS}
    for name, threshold in (changed or {}).items():
        if name not in bounds:
            close = difflib.get_close_matches(str(name), bounds, n=1)
            hint = f"Did you mean {close[0]!r}?" if close else f"There are {', '.join(bounds)}."
            raise ValueError(f"thresholds has no finding {name!r}. {hint}")
        if threshold is not None:
            check_number(f"the threshold of {name}", threshold, *bounds[name], closed=True)
    return {finding.name: finding.threshold for finding in FINDINGS} | dict(changed or {})
