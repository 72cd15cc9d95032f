"""Options that the command line adds to the zoo's scripts."""

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rl_zoo3.utils import StoreDict

ENVPOOL = "envpool"
_VEC_ENVS = ("dummy", "subproc", ENVPOOL)
# Scripts that make environments
SCRIPTS = ("train", "enjoy", "record_video")


@dataclass
class Options:
    """
    :param rescale_to_n_envs: number of environments for which hyper-parameters are rescaled; ``None``: as they are
    :param advice: whether training is watched by an ``AdviceCallback``
    :param fixed: parameters of the search that are not drawn, by the names that they have there
    :param vec_env: kind of vectorised environment; ``None``: the script's own choice
    """

    rescale_to_n_envs: int | None = None
    advice: bool = False
    fixed: dict[str, Any] = field(default_factory=dict)
    vec_env: str | None = None


# Of the script that runs: upstream makes its parser and its ExperimentManager where nothing can be passed to them.
current = Options()


def parser(script: str, prog: str) -> argparse.ArgumentParser:
    """
    :param script: name of the script
    :param prog: name of the program
    :return: parser of these options alone
    """
    result = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    result.set_defaults(**vars(Options()))
    group = result.add_argument_group("options of sb3-ppo-ewma")
    group.add_argument(
        "--vec-env",
        choices=_VEC_ENVS,
        help="VecEnv type; envpool: tasks of EnvPool, stepped in C++ threads"
        + ("" if script == "train" else " (default: the one of the training)"),
    )
    if script != "train":
        return result
    group.add_argument(
        "--rescale-to-n-envs",
        type=int,
        metavar="N",
        help="train with N environments, and hyper-parameters rescaled from those for their own number",
    )
    group.add_argument(
        "--advice", action="store_true", help="say in a line what is wrong with a training, and what to do"
    )
    group.add_argument(
        "--fix",
        nargs="+",
        action=StoreDict,
        dest="fixed",
        default={},
        metavar="NAME:VALUE",
        help="parameters of an Optuna trial that are not searched (e.g. n_epochs:1)",
    )
    return result


def help_text(script: str, prog: str) -> str:
    """
    :param script: name of the script
    :param prog: name of the program
    :return: help on these options, without a usage line
    """
    return parser(script, prog).format_help().partition("\n\n")[2]


@contextlib.contextmanager
def taken_from(arguments: Sequence[str], script: str, prog: str) -> Iterator[list[str]]:
    """
    :param arguments: of the script and these
    :param script: its name
    :param prog: name of the program
    :return: those of the script; within the context, the others are in effect
    """
    global current
    given, others = parser(script, prog).parse_known_args(arguments)
    if script == "train" and given.vec_env not in (None, ENVPOOL):
        others += ["--vec-env", given.vec_env]
    before, current = current, Options(**vars(given))
    try:
        yield others
    finally:
        current = before
