"""Rescale an entry of the zoo's files to another number of environments; the script ``rescale`` prints it."""

import argparse
import contextlib
import copy
import importlib
import io
import keyword
import math
import tempfile
import warnings
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, get_args

import gymnasium as gym
import numpy as np
import yaml
from rl_zoo3 import exp_manager
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.utils import StoreDict

from sb3_ppo_ewma._arguments import check_integer
from sb3_ppo_ewma.batch_scaling import Rescaled, Strategy, rescale, with_defaults
from sb3_ppo_ewma.zoo.algorithms import ALGORITHMS
from sb3_ppo_ewma.zoo.patches.strict_yaml import Dumper
from sb3_ppo_ewma.zoo.python_values import evaluate

# Hyper-parameters that the zoo evaluates as Python if they are text
_EVALUATED = ("policy_kwargs", "replay_buffer_kwargs", "replay_buffer_class", "monitor_kwargs", "normalize")


def rescaled(
    algo: str, entry: Mapping[str, Any], n_envs: int, strategy: Strategy = "samples", *, adam_betas: bool = False
) -> Rescaled:
    """
    :param algo: name of one of our algorithms
    :param entry: hyper-parameters as in the zoo's files
    :param n_envs: new number of environments
    :param strategy: see :func:`~sb3_ppo_ewma.batch_scaling.rescale`
    :param adam_betas: with ``"paper"``, whether to rescale Adam's betas too
    :return: the rescaled entry, with an explanation of every change
    :raises ValueError: if the algorithm or the entry cannot be rescaled
    """
    if algo not in ALGORITHMS:
        raise ValueError(f"hyper-parameters of {algo} cannot be rescaled, only those of {', '.join(ALGORITHMS)}")
    check_integer("n_envs", n_envs, minimum=1)
    complete = with_defaults(ALGORITHMS[algo], {**entry, "n_envs": tuned_number_of_envs(entry)})
    entry = {name: value for name, value in entry.items() if name != "tuned_for_n_envs"}
    written = complete.get("policy_kwargs")
    if isinstance(written, str):
        complete["policy_kwargs"] = evaluate(written, vars(exp_manager))
    ratio = Fraction(n_envs, complete["n_envs"])
    complete.pop("tuned_for_n_envs", None)
    result = rescale(complete, ratio, strategy=strategy, adam_betas=adam_betas)
    changed = {change.name: change.new for change in result.changes if change.name in entry or change.new != change.old}
    return Rescaled({**entry, **changed}, result.changes)


def tuned_number_of_envs(entry: Mapping[str, Any]) -> int:
    """
    :param entry: hyper-parameters as in the zoo's files
    :return: number of environments that they are for
    """
    return int(entry.get("tuned_for_n_envs") or entry.get("n_envs", 1))


def main() -> None:
    """Print the hyper-parameters of an environment for another number of environments."""
    args = _parser().parse_args()
    entry = read_entry(args)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = rescaled(args.algo, entry, args.n_envs, args.strategy, adam_betas=args.adam_betas)
    print(result.explanation)
    for warning in caught:
        print(f"\nWarning: {warning.message}")
    print(f"\n{as_yaml(args.env, result.hyperparameters)}", end="")


def read_entry(args: argparse.Namespace) -> dict[str, Any]:
    """
    :param args: arguments of :func:`entry_parser`
    :return: hyper-parameters of the environment, with those of the command line
    :raises ValueError: if the environment is unknown
    """
    for module in args.gym_packages:
        importlib.import_module(module)
    if args.env not in gym.registry:
        raise ValueError(f"{args.env} not found in gym registry.")
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        entry, _ = entry_manager(args, folder).read_hyperparameters()
    return dict(entry)


def entry_manager(args: argparse.Namespace, folder: str, **kwargs: Any) -> ExperimentManager:
    """
    :param args: arguments of :func:`entry_parser`
    :param folder: folder for logs
    :param kwargs: further arguments of ``ExperimentManager``
    :return: the zoo's manager for this environment
    """
    return ExperimentManager(
        argparse.Namespace(**vars(args)),  # a copy: the manager changes it
        args.algo,
        args.env,
        folder,
        hyperparams=copy.deepcopy(args.hyperparams),
        storage=args.storage,
        study_name=args.study_name,
        trial_id=args.trial_id,
        config=args.conf_file,
        **kwargs,
    )


def entry_parser() -> argparse.ArgumentParser:
    """
    :return: parser of the options that choose an entry, without help, to be the parent of a script's parser
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--algo", required=True, choices=list(ALGORITHMS))
    parser.add_argument("--env", required=True, help="name of the environment")
    parser.add_argument("-conf", "--conf-file", help="file of hyper-parameters instead of ours")
    parser.add_argument("-params", "--hyperparams", nargs="+", action=StoreDict, metavar="NAME:VALUE")
    parser.add_argument("--storage", help="journal file (.log) or database URL of an Optuna study")
    parser.add_argument("--study-name", help="name of an Optuna study")
    parser.add_argument("--trial-id", type=int, help="number of the trial to take hyper-parameters from")
    parser.add_argument("--gym-packages", nargs="+", default=[], help="packages that register environments")
    return parser


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        parents=[entry_parser()],
        description="Print hyper-parameters with which training behaves the same on another number of environments: "
        "how and why they change, then an entry for a file of hyper-parameters.",
    )
    parser.add_argument("--n-envs", required=True, type=int, metavar="N", help="new number of environments")
    parser.add_argument(
        "--strategy",
        choices=get_args(Strategy),
        default="samples",
        help="keep the samples of an iteration, or multiply batches as the paper does (default: samples)",
    )
    parser.add_argument("--adam-betas", action="store_true", help="with --strategy paper, change Adam's betas as well")
    return parser


def as_yaml(env_id: str, entry: Mapping[str, Any]) -> str:
    """
    :param env_id: name of the environment
    :param entry: its hyper-parameters
    :return: YAML for the zoo's files
    :raises ValueError: if a value cannot be written there
    """
    plain: dict[str, Any] = {}
    for name, value in entry.items():
        try:
            plain[name] = _evaluated_text(value) if name in _EVALUATED else _plain(value)
        except ValueError as error:
            raise ValueError(f"{name} cannot be written to a file of hyper-parameters: {error}") from None
    return str(yaml.dump({env_id: plain}, Dumper=Dumper, sort_keys=False, width=math.inf))


def _plain(value: Any) -> Any:
    """
    :param value: a hyper-parameter that the zoo takes as it is
    :return: the same in YAML's types, with classes by their full names, under which the zoo imports them
    """
    if isinstance(value, type):
        return _full_name(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {_plain(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise ValueError(f"{value!r} is neither text, a number, a list, a mapping nor a class")


def _evaluated_text(value: Any) -> Any:
    """
    :param value: a hyper-parameter that the zoo evaluates if it is text
    :return: text that it evaluates to the value, or YAML
    """
    if value is None or isinstance(value, str | bool):
        return value
    with contextlib.suppress(ValueError):
        plain = _plain(value)
        if plain == value and not _has_tuples(value):
            return plain
    return source(value)


def _has_tuples(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_tuples, value.values()))
    return isinstance(value, tuple) or (isinstance(value, list) and any(map(_has_tuples, value)))


def source(value: Any) -> str:
    """
    :param value: ``policy_kwargs`` or a value in them
    :return: Python expression that the zoo evaluates to it
    :raises ValueError: if there is none
    """
    if isinstance(value, Mapping):
        if all(isinstance(name, str) and name.isidentifier() and not keyword.iskeyword(name) for name in value):
            return f"dict({', '.join(f'{name}={source(each)}' for name, each in value.items())})"
        return f"{{{', '.join(f'{source(name)}: {source(each)}' for name, each in value.items())}}}"
    if isinstance(value, list | tuple):
        inner = ", ".join(map(source, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
    if isinstance(value, np.generic):
        return source(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return f"float('{value}')"
    if isinstance(value, type):
        return _known_name(value)
    if value is None or isinstance(value, str | bool | int | float):
        return repr(value)
    raise ValueError(f"{value!r} is neither text, a number, a list, a mapping nor a class")


def _known_name(value: type) -> str:
    """
    :param value: a class
    :return: name of the class where the zoo evaluates text
    """
    short = {"torch.nn": "nn", "torch.optim": "th.optim"}
    names = [f"{short[p]}.{value.__name__}" for p in short if value.__module__.startswith(p)]
    for name in (*names, value.__name__, _full_name(value)):
        with contextlib.suppress(Exception):
            if eval(name, vars(exp_manager)) is value:
                return name
    raise ValueError(f"the zoo does not know the class {_full_name(value)} there")


def _full_name(value: type) -> str:
    if "<locals>" in value.__qualname__ or value.__module__ == "__main__":
        raise ValueError(f"the class {value.__qualname__} cannot be imported")
    return f"{value.__module__}.{value.__qualname__}"


if __name__ == "__main__":
    main()
