"""Statistics of several runs, with rliable's intervals."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.stats
from rliable import library


@dataclass
class Estimate:
    """A statistic and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        digits = 1 if max(abs(self.low), abs(self.high)) >= 10 else 2
        return f"{self.value:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"

    def against(self, other: "Estimate") -> str:
        if self.low > other.high:
            return "above"
        return "below" if self.high < other.low else "overlap"


def estimate(
    score_dict: Mapping[str, Any], statistic: Callable[..., float | np.ndarray], reps: int
) -> dict[str, list[Estimate]]:
    """
    rliable's stratified bootstrap, with intervals by percentiles.

    :param score_dict: of each algorithm (runs, environments), or several such arrays, which the statistic takes
    :param statistic: of the scores; one number or several
    :param reps: number of resamples
    :return: of each algorithm, as many estimates as the statistic has numbers
    """
    np.random.seed(0)  # rliable draws from the global generator
    points, intervals = library.get_interval_estimates(
        dict(score_dict), lambda *arrays: np.atleast_1d(statistic(*arrays)), reps=reps
    )
    return {
        name: [Estimate(*map(float, numbers)) for numbers in zip(points[name], *intervals[name], strict=True)]
        for name in points
    }


def iqm_at_every_step(curves: np.ndarray) -> np.ndarray:
    # (runs, 1, evaluations); what metrics.aggregate_iqm does with each of them
    return scipy.stats.trim_mean(curves, proportiontocut=0.25, axis=0)[0]
