"""
Mends of rl-zoo3's ``ExperimentManager`` and of the way it reads ``-params``. They turn failures into what was meant,
for all algorithms, and change nothing that works.
"""

import argparse
import contextlib
import functools
import inspect
import io
import re
import shutil
import warnings
from collections import OrderedDict
from pathlib import Path
from pprint import pprint
from typing import Any

import optuna
import rl_zoo3.utils
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from rl_zoo3 import exp_manager
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
from rl_zoo3.utils import ALGOS, StoreDict

from sb3_ppo_ewma.zoo import options
from sb3_ppo_ewma.zoo.algorithms import ALGORITHMS, hyperparameter_file
from sb3_ppo_ewma.zoo.mending import Function, replace
from sb3_ppo_ewma.zoo.rescaling import rescaled
from sb3_ppo_ewma.zoo.search_space import BUDGET, N_ENVS

_BARE_WORD = re.compile(r"[A-Za-z_][\w.+-]*")
_SCHEDULES = ("learning_rate", "clip_range", "clip_range_vf", "delta_std")
_OWN_SCHEDULES = ("aux_learning_rate",)
_ADVICE = "sb3_ppo_ewma.AdviceCallback"
# What hyper-parameters can raise: NaNs and refused values, overflows, too little memory (in torch a RuntimeError)
_BAD_TRIAL = (ValueError, TypeError, AssertionError, ArithmeticError, RuntimeError, MemoryError)
# What Optuna says, in memory and journals, and in databases, when it is asked for the best trial of none
_NO_BEST_TRIAL = ("No trials are completed yet.", "Record does not exist.")


@functools.cache  # once
def mend() -> None:
    """Apply the mends, in place: a script may hold the class already."""
    replace(ExperimentManager, "__init__", _init)
    replace(ExperimentManager, "entry_point", _entry_point)
    replace(ExperimentManager, "setup_experiment", _setup_experiment)
    replace(ExperimentManager, "read_hyperparameters", _read_hyperparameters)
    replace(ExperimentManager, "load_trial", _load_trial)
    replace(ExperimentManager, "_preprocess_schedules", _preprocess_schedules)
    replace(ExperimentManager, "_create_sampler", _create_sampler)
    replace(ExperimentManager, "objective", _objective)
    replace(ExperimentManager, "hyperparameters_optimization", _hyperparameters_optimization)
    replace(StoreDict, "__call__", _store)


def _init(upstream: Function, manager: Any, *args: Any, **kwargs: Any) -> None:
    # Without --conf-file, upstream looks in its own folder, where our files are not.
    upstream(manager, *args, **kwargs)
    default = Path(exp_manager.__file__).parent / "hyperparams" / f"{manager.algo}.yml"
    if manager.algo in ALGORITHMS and Path(manager.config) == default:
        manager.config = str(hyperparameter_file(manager.algo))
    # A name of ours, where there is no such file
    elif manager.config.endswith(".yml") and not Path(manager.config).exists():
        ours = hyperparameter_file(manager.config.removesuffix(".yml"))
        manager.config = str(ours) if ours.is_file() else manager.config


def _entry_point(upstream: Function, env_id: str) -> str:
    try:
        return str(upstream(env_id))
    except KeyError:
        raise ValueError(f"{env_id} not found in gym registry.") from None


def _setup_experiment(upstream: Function, manager: Any) -> Any:
    is_new = not Path(manager.save_path).exists()
    try:
        result = upstream(manager)
        if result is None:  # -optimize builds models later: refuse unknown names now, not in every trial
            inspect.signature(ALGOS[manager.algo]).bind_partial(**manager._hyperparams)
            if manager.algo in ALGORITHMS:
                manager._hyperparams = _SearchedHyperparams(manager._hyperparams)
        return result
    except Exception as error:
        # Made just now; enjoy would take it for the latest run. Upstream writes the arguments when a run begins: with
        # them it is that of another process that was given the same number.
        if is_new and not Path(manager.params_path, "args.yml").exists():
            shutil.rmtree(manager.save_path, ignore_errors=True)
        if isinstance(error, TypeError):  # an unknown hyper-parameter or one of the wrong type
            raise ValueError(f"{manager.algo}: {error}") from error
        raise


class _SearchedHyperparams(dict[str, Any]):
    """Where a search starts from: what upstream's ``objective`` copies, then updates with what a trial drew."""

    def copy(self) -> "_SearchedHyperparams":
        return _SearchedHyperparams(self)

    def update(self, drawn: dict[str, Any]) -> None:  # type: ignore[override]  # all that upstream's objective needs
        super().update(_completed(drawn, self.get("policy_kwargs")))


def _completed(hyperparams: dict[str, Any], policy_kwargs: Any) -> dict[str, Any]:
    """
    Upstream drops the ``policy_kwargs`` that it had before when those of a trial come. Their features extractor is what
    lets the policy see at all, so where they name one, they are completed instead.

    :param hyperparams: what goes before
    :param policy_kwargs: those that are there already, if any
    :return: the same with completed ``policy_kwargs``
    """
    if isinstance(policy_kwargs, str):
        policy_kwargs = eval(policy_kwargs, vars(exp_manager))  # as upstream does later
    if "policy_kwargs" not in hyperparams or "features_extractor_class" not in (policy_kwargs or {}):
        return hyperparams
    return {**hyperparams, "policy_kwargs": {**policy_kwargs, **hyperparams["policy_kwargs"]}}


def _read_hyperparameters(upstream: Function, manager: Any) -> Any:
    hyperparams, saved = _read_with_trial(upstream, manager)
    changed: dict[str, Any] = {}
    if options.current.rescale_to_n_envs is not None:
        if manager.optimize_hyperparameters:
            raise ValueError(
                "--rescale-to-n-envs does not go with -optimize, which draws what would be rescaled: search first, "
                "then train with --trial-id and --rescale-to-n-envs"
            )
        result = rescaled(manager.algo, hyperparams, options.current.rescale_to_n_envs)
        print(f"Rescaled from {hyperparams.get('n_envs', 1)} environments:\n{result.explanation}")
        changed |= result.hyperparameters
    if options.current.advice:
        given = hyperparams.get("callback") or []
        changed["callback"] = [*(given if isinstance(given, list) else [given]), _ADVICE]
    # What goes into training, and what is saved beside the agent, in upstream's order
    return {**hyperparams, **changed}, OrderedDict(sorted({**saved, **changed}.items()))


def _read_with_trial(upstream: Function, manager: Any) -> Any:
    if manager.trial_id is None:
        return upstream(manager)
    if not (manager.storage and manager.study_name):
        raise ValueError(f"--trial-id {manager.trial_id} needs --storage and --study-name")
    trial = manager.load_trial(manager.storage, manager.study_name, manager.trial_id)
    given = manager.custom_hyperparams or {}
    # Not by upstream, which knows no trial 0 and no completed policy_kwargs.
    trial_id, manager.trial_id = manager.trial_id, None
    try:
        if manager.algo in ALGORITHMS:
            with contextlib.redirect_stdout(io.StringIO()):
                without_trial, _ = upstream(manager)
            trial = _completed(trial, without_trial.get("policy_kwargs"))
            given = _completed(given, trial.get("policy_kwargs"))
            trial = {**_setting_of_trial(manager, trial_id), **trial}
        # Command line arguments go before those of the trial.
        manager.custom_hyperparams = {**trial, **given}
        return upstream(manager)
    finally:
        manager.trial_id = trial_id


def _load_trial(
    upstream: Function, manager: Any, storage: str, study_name: str, trial_id: int | None = None, convert: bool = True
) -> dict[str, Any]:
    if storage.endswith(".log") and not Path(storage).is_file():
        raise FileNotFoundError(f"--storage {storage} does not exist")  # Optuna would create it
    try:
        params: dict[str, Any] = upstream(manager, storage, study_name, trial_id, convert=False)
    except KeyError:
        raise ValueError(f"{storage} has no study {study_name}") from None
    except IndexError:
        raise ValueError(f"study {study_name} has no trial {trial_id}") from None
    try:
        return HYPERPARAMS_CONVERTER[manager.algo](params) if convert else params
    except KeyError as error:
        raise ValueError(
            f"trial {trial_id} of study {study_name} has no {error}: it is none of {manager.algo}, or never started"
        ) from None


def _setting_of_trial(manager: Any, trial_id: int) -> dict[str, Any]:
    """
    :param manager: upstream's
    :param trial_id: of a trial that was found
    :return: the number of environments that it was trained with, where that is known
    """
    storage: Any = manager.storage
    if storage.endswith(".log"):
        storage = JournalStorage(JournalFileBackend(storage))
    trial = optuna.load_study(storage=storage, study_name=manager.study_name).trials[trial_id]
    return {"n_envs": trial.user_attrs[N_ENVS]} if N_ENVS in trial.user_attrs else {}


def _create_sampler(upstream: Function, manager: Any, sampler_method: str) -> Any:
    sampler = upstream(manager, sampler_method)
    if not options.current.fixed:
        return sampler
    _check_fixed(manager, options.current.fixed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.PartialFixedSampler(options.current.fixed, sampler)


def _check_fixed(manager: Any, fixed: dict[str, Any]) -> None:
    """
    :param manager: upstream's
    :param fixed: parameters of a trial that are not to be drawn
    :raises ValueError: if a trial has none of that name, or not with that value
    """
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)).ask()
    HYPERPARAMS_SAMPLER[manager.algo](trial, manager.n_actions, manager.n_envs, {})
    for name, value in fixed.items():
        if name not in trial.distributions:
            raise ValueError(f"--fix {name}: the search of {manager.algo} has {', '.join(trial.distributions)}")
        distribution = trial.distributions[name]
        try:
            is_possible = distribution._contains(distribution.to_internal_repr(value))
        except ValueError:
            is_possible = False
        if not is_possible:
            raise ValueError(f"--fix {name}: {value!r} is not within {distribution}")


def _preprocess_schedules(upstream: Function, hyperparams: dict[str, Any]) -> dict[str, Any]:
    given = {name: hyperparams[name] for name in (*_SCHEDULES, *_OWN_SCHEDULES) if name in hyperparams}
    # Upstream refuses None, SB3's and our constructors know what it means.
    without = [name for name, value in given.items() if value is None]
    own = [name for name in _OWN_SCHEDULES if given.get(name) is not None]
    others = {name: value for name, value in hyperparams.items() if name not in (*without, *own)}
    try:
        # By the only names that upstream knows
        schedules = {name: upstream({"learning_rate": given[name]})["learning_rate"] for name in own}
        return {**upstream(others), **schedules, **dict.fromkeys(without)}
    except ValueError as error:
        raise ValueError(f"schedules must be numbers, lin_NUMBER or None, got {given}") from error


def _objective(upstream: Function, manager: Any, trial: optuna.Trial) -> float:
    # Upstream catches what training raises, but not what building the model does.
    if manager.algo in ALGORITHMS:
        trial.set_user_attr(BUDGET, manager.n_timesteps)
        trial.set_user_attr(N_ENVS, manager.n_envs)
    try:
        return float(upstream(manager, trial))
    except _BAD_TRIAL as error:
        print(f"Trial {trial.number} is pruned: {error}")
        pprint(trial.params)
        raise optuna.TrialPruned from error


def _hyperparameters_optimization(upstream: Function, manager: Any) -> None:
    try:
        upstream(manager)
    except ValueError as error:
        if str(error) not in _NO_BEST_TRIAL:
            raise
        raise ValueError(
            "no trial was completed: each one was pruned or failed, for the reasons printed above"
        ) from None


def _store(
    upstream: Function,
    action: argparse.Action,
    parser: argparse.ArgumentParser,
    namespace: argparse.Namespace,
    values: list[str],
    option_string: str | None = None,
) -> None:
    setattr(namespace, action.dest, dict(_read_pair(action, pair) for pair in values))


def _read_pair(action: argparse.Action, pair: str) -> tuple[str, Any]:
    name, colon, text = pair.partition(":")
    if not (name and colon and text):
        raise argparse.ArgumentError(action, f"expected NAME:VALUE, got {pair!r}")
    try:
        # As upstream: Python, in its namespace
        return name, eval(text, vars(rl_zoo3.utils))
    except Exception as error:
        if isinstance(error, NameError | SyntaxError) and _BARE_WORD.fullmatch(text):
            return name, text  # upstream wants it in two pairs of quotes
        raise argparse.ArgumentError(action, f"cannot read the value of {pair!r}: {error}") from error
