"""Options that this package adds to the zoo's scripts."""

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rl_zoo3.utils import StoreDict

ENVPOOL = "envpool"
VEC_ENVS = ("dummy", "subproc", ENVPOOL)
# Scripts with a choice of vectorised environments, those to which --gym-packages is added, and all with own options
_VEC_ENV = ("train", "enjoy", "record_video", "export")
_GYM_PACKAGES = ("record_video", "record_training", "benchmark", "push_to_hub")
SCRIPTS = (*_VEC_ENV, *_GYM_PACKAGES, "plot_train")


@dataclass
class Options:
    """
    :param n_envs: number of environments, to which hyper-parameters are rescaled; ``None``: that of the entry
    :param advice: whether to add an ``AdviceCallback`` to training
    :param fixed: values of search parameters that Optuna does not sample, by the parameter's name in a trial
    :param checkpoint_every: steps between checkpoints of the whole run; ``None``: none
    :param resume: whether to go on with a run that the same command has begun
    :param vec_env: kind of vectorised environment; ``None`` leaves the choice to the script
    :param gym_packages: modules to import because they register environments, in scripts that lack the option
    :param output: file for the plot of ``plot_train``; ``None``: show it
    """

    n_envs: int | None = None
    advice: bool = False
    fixed: dict[str, Any] = field(default_factory=dict)
    vec_env: str | None = None
    checkpoint_every: int | None = None
    resume: bool = False
    gym_packages: Sequence[str] = ()
    output: str | None = None


# Options of the running script. A global, because upstream's scripts cannot pass them to its ExperimentManager.
current = Options()


def parser(script: str, prog: str) -> argparse.ArgumentParser:
    """
    :param script: name of the script
    :param prog: name of the program
    :return: parser of our options only
    """
    result = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    result.set_defaults(**vars(Options()))
    group = result.add_argument_group("options of sb3-ppo-ewma")
    if script in _VEC_ENV:
        group.add_argument(
            "--vec-env",
            choices=VEC_ENVS,
            help="VecEnv type; envpool: tasks of EnvPool, stepped in C++ threads"
            + ("" if script == "train" else " (default: EnvPool's if training used it, else dummy or subproc)"),
        )
    if script in _GYM_PACKAGES:
        group.add_argument(
            "--gym-packages",
            nargs="+",
            metavar="MODULE",
            help="modules to import because they register environments, beside those that training imported",
        )
    if script == "plot_train":
        group.add_argument("-o", "--output", metavar="FILE", help="save the plot (.png, .pdf, .svg) and show none")
    if script == "train":
        _add_options_of_train(group)
    return result


def _add_options_of_train(group: Any) -> None:
    """
    :param group: part of a parser
    """
    group.add_argument(
        "--n-envs",
        type=int,
        metavar="N",
        help="train with N environments, with hyper-parameters rescaled to behave the same; with -optimize, search "
        "those for N environments",
    )
    group.add_argument(
        "--checkpoint-every",
        type=int,
        metavar="N",
        help="every N steps, and at the end, save the whole run, to go on from there with --resume",
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="go on with the newest run of the same command from its newest checkpoint, or begin one; saves every "
        "50000 steps unless --checkpoint-every says otherwise",
    )
    group.add_argument("--advice", action="store_true", help="print a line when training goes wrong, with a remedy")
    group.add_argument(
        "--fix",
        nargs="+",
        action=StoreDict,
        dest="fixed",
        default={},
        metavar="NAME:VALUE",
        help="parameters of an Optuna trial to keep at a value (e.g. n_epochs:1)",
    )


def help_text(script: str, prog: str) -> str:
    """
    :param script: name of the script
    :param prog: name of the program
    :return: help for our options, without a usage line
    """
    return parser(script, prog).format_help().partition("\n\n")[2]


@contextlib.contextmanager
def taken_from(arguments: Sequence[str], script: str, prog: str) -> Iterator[list[str]]:
    """
    Within the context, our options have the values given on the command line.

    :param arguments: arguments of the script, with our options among them
    :param script: name of the script
    :param prog: name of the program
    :return: the arguments without our options
    """
    given, others = parser(script, prog).parse_known_args(arguments)
    if script == "train" and given.vec_env not in (None, ENVPOOL):
        others += ["--vec-env", given.vec_env]
    with replaced(Options(**vars(given))):
        yield others


@contextlib.contextmanager
def replaced(new: Options) -> Iterator[None]:
    """
    :param new: our options within the context
    """
    global current
    before, current = current, new
    try:
        yield
    finally:
        current = before
