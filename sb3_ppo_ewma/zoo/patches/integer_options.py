"""
Numbers that make no sense as an option end in a traceback, or are taken for something else without a word.

Seen in rl_zoo3 2.9.2. Its parsers check that an option is an integer, not which: ``--log-interval 0`` is a
``ZeroDivisionError``, ``--eval-episodes 0`` evaluates nothing, ``-n 0`` trains for the budget of the file. Source:
https://github.com/DLR-RM/rl-baselines3-zoo/blob/master/rl_zoo3/train.py and the scripts beside it.
"""

import argparse
import contextlib
from collections.abc import Iterator
from typing import NamedTuple

from sb3_ppo_ewma.zoo.patches._replace import parsed_arguments, script_source


class _Range(NamedTuple):
    minimum: int
    also: tuple[int, ...] = ()
    maximum: int | None = None

    def __contains__(self, number: object) -> bool:
        assert isinstance(number, int)
        return number in self.also or (number >= self.minimum and (self.maximum is None or number <= self.maximum))

    def __str__(self) -> str:
        others = "".join(f"{number} or " for number in self.also)
        return others + (f">= {self.minimum}" if self.maximum is None else f"in [{self.minimum}, {self.maximum}]")


# By the name of the option in all scripts that have it; its default is allowed too. --eval-freq and --save-freq may be
# any number: what is not positive switches them off.
_RANGES = {
    "n_timesteps": _Range(1),
    "n_envs": _Range(1),
    "num_threads": _Range(1, also=(-1,)),
    "verbose": _Range(0),
    "seed": _Range(0, maximum=2**32 - 1),
    "exp_id": _Range(0, also=(-1,)),
    "load_checkpoint": _Range(0),
    "log_interval": _Range(1, also=(-2, -1)),
    "eval_episodes": _Range(1),
    "n_eval_envs": _Range(1),
    "n_trials": _Range(1),
    "max_total_trials": _Range(1),
    "n_jobs": _Range(1, also=(-1,)),
    "n_startup_trials": _Range(0),
    "n_evaluations": _Range(1),
    "trial_id": _Range(0),
    "max_timesteps": _Range(1),
    "min_timesteps": _Range(0),
    "episode_window": _Range(1),
    "figsize": _Range(1),
    "fontsize": _Range(1),
}


def is_needed() -> bool:
    """:return: whether ``train`` takes any integer"""
    return 'help="Number of episodes to use for evaluation", default=5, type=int)' in script_source("rl_zoo3.train")


@contextlib.contextmanager
def apply() -> Iterator[None]:
    """Within the context, the first parser refuses what is outside the range of an option."""
    with parsed_arguments(_check):
        yield


def _check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    for action in parser._actions:
        given = getattr(arguments, action.dest, None)
        allowed = _RANGES.get(action.dest)
        if allowed is None or given == action.default:
            continue
        for number in given if isinstance(given, list) else [given]:
            if isinstance(number, int) and number not in allowed:
                parser.error(str(argparse.ArgumentError(action, f"must be {allowed}, got {number}")))
