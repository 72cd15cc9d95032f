"""
Features of this package inside rl-zoo3's ``ExperimentManager``: our files of hyper-parameters, the options
``--n-envs``, ``--advice`` and ``--fix``, schedules of our own parameters, the budget and number of
environments that a search stores with each trial.

What is repaired in the zoo is in :mod:`sb3_ppo_ewma.zoo.patches`.
"""

import functools
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import optuna
from rl_zoo3 import exp_manager
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.hyperparams_opt import HYPERPARAMS_SAMPLER

from sb3_ppo_ewma._arguments import check_integer
from sb3_ppo_ewma.zoo import options
from sb3_ppo_ewma.zoo.algorithms import ALGORITHMS, BASELINES, hyperparameter_file
from sb3_ppo_ewma.zoo.patches._replace import AnyFunction, replace_function
from sb3_ppo_ewma.zoo.patches.trial_normalization import stored_trial
from sb3_ppo_ewma.zoo.rescaling import tuned_number_of_envs
from sb3_ppo_ewma.zoo.search_space import BUDGET, N_ENVS

_OWN_SCHEDULES = ("aux_learning_rate",)
_ADVICE = "sb3_ppo_ewma.AdviceCallback"


@functools.cache  # once
def install_hooks() -> None:
    """Replace methods of ``ExperimentManager`` in place: a script may have imported the class already."""
    replace_function(ExperimentManager, "__init__", _init)
    replace_function(ExperimentManager, "setup_experiment", _setup_experiment)
    replace_function(ExperimentManager, "read_hyperparameters", _read_hyperparameters)
    replace_function(ExperimentManager, "load_trial", _load_trial)
    replace_function(ExperimentManager, "_preprocess_schedules", _preprocess_schedules)
    replace_function(ExperimentManager, "_create_sampler", _create_sampler)
    replace_function(ExperimentManager, "objective", _objective)


def _init(upstream: AnyFunction, manager: Any, *args: Any, **kwargs: Any) -> None:
    upstream(manager, *args, **kwargs)
    default = Path(exp_manager.__file__).parent / "hyperparams" / f"{manager.algo}.yml"
    # Without --conf-file, upstream looks in its own folder. Our files are elsewhere.
    is_ours = manager.algo in ALGORITHMS or (manager.algo in BASELINES and not default.is_file())
    if is_ours and Path(manager.config) == default:
        manager.config = str(hyperparameter_file(manager.algo))
    # --conf-file ppo_ewma_tuned.yml: the name of one of our files, unless the user has a file of that name
    elif manager.config.endswith(".yml") and not Path(manager.config).exists():
        ours = hyperparameter_file(manager.config.removesuffix(".yml"))
        manager.config = str(ours) if ours.is_file() else manager.config


def _setup_experiment(upstream: AnyFunction, manager: Any) -> Any:
    try:
        return upstream(manager)
    except TypeError as error:  # an unknown hyper-parameter or one of the wrong type: a mistake, not a bug
        raise ValueError(f"{manager.algo}: {error}") from error


def _read_hyperparameters(upstream: AnyFunction, manager: Any) -> Any:
    if options.current.fixed and not manager.optimize_hyperparameters:
        raise ValueError("--fix keeps parameters of a search at a value, and needs -optimize")
    hyperparams, saved = upstream(manager)
    changed: dict[str, Any] = {}
    if manager.optimize_hyperparameters and hyperparams.get("tuned_for_n_envs") is not None:
        changed["tuned_for_n_envs"] = None  # trials are tuned for the number that they are trained with
    if options.current.n_envs is not None:
        changed |= _with_n_envs(manager, hyperparams, options.current.n_envs)
    if options.current.advice:
        given = hyperparams.get("callback") or []
        changed["callback"] = [*(given if isinstance(given, list) else [given]), _ADVICE]
    # What training uses, and what is saved beside the agent, sorted like upstream's
    both = {**hyperparams, **changed}, OrderedDict(sorted({**saved, **changed}.items()))
    for each in both:
        if each.get("tuned_for_n_envs", 0) is None:  # the default
            del each["tuned_for_n_envs"]
    return both


def _with_n_envs(manager: Any, hyperparams: dict[str, Any], n_envs: int) -> dict[str, Any]:
    """
    :param manager: the zoo's ``ExperimentManager``
    :param hyperparams: those of the file or the trial
    :param n_envs: number of environments to train with
    :return: changes of the hyper-parameters; the model rescales the others
    :raises ValueError: if the algorithm is not one of this package, or ``n_envs`` is below 1
    """
    if manager.algo not in ALGORITHMS:
        raise ValueError(f"--n-envs rescales hyper-parameters of {', '.join(ALGORITHMS)}, not those of {manager.algo}")
    check_integer("n_envs", n_envs, minimum=1)
    if manager.optimize_hyperparameters:
        return {"n_envs": n_envs}
    return {"n_envs": n_envs, "tuned_for_n_envs": tuned_number_of_envs(hyperparams)}


def _load_trial(
    upstream: AnyFunction,
    manager: Any,
    storage: str,
    study_name: str,
    trial_id: int | None = None,
    convert: bool = True,
) -> dict[str, Any]:
    hyperparams: dict[str, Any] = upstream(manager, storage, study_name, trial_id, convert)
    if not convert or manager.algo not in ALGORITHMS or trial_id is None:
        return hyperparams
    attributes = stored_trial(storage, study_name, trial_id).user_attrs
    if N_ENVS not in attributes:  # not made by our search
        return hyperparams
    return {"n_envs": attributes[N_ENVS], "tuned_for_n_envs": None, **hyperparams}


def _create_sampler(upstream: AnyFunction, manager: Any, sampler_method: str) -> Any:
    sampler = upstream(manager, sampler_method)
    if not options.current.fixed:
        return sampler
    fixed = _checked_fixed(manager, options.current.fixed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.PartialFixedSampler(fixed, sampler)


def _checked_fixed(manager: Any, fixed: dict[str, Any]) -> dict[str, Any]:
    """
    :param manager: the zoo's ``ExperimentManager``
    :param fixed: values of the parameters of a trial that are not sampled
    :return: the same, with the word ``none`` where it is a choice
    :raises ValueError: if a trial has no parameter of that name, or the value is outside its range
    """
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)).ask()
    HYPERPARAMS_SAMPLER[manager.algo](trial, manager.n_actions, manager.n_envs, {})
    checked: dict[str, Any] = {}
    for name, value in fixed.items():
        if name not in trial.distributions:
            raise ValueError(f"--fix {name}: the search of {manager.algo} has {', '.join(trial.distributions)}")
        distribution = trial.distributions[name]
        if value is None and "none" in getattr(distribution, "choices", ()):
            value = "none"
        try:
            is_possible = distribution._contains(distribution.to_internal_repr(value))
        except ValueError:
            is_possible = False
        if not is_possible:
            raise ValueError(f"--fix {name}: {value!r} is not within {distribution}")
        checked[name] = value
    return checked


def _preprocess_schedules(upstream: AnyFunction, hyperparams: dict[str, Any]) -> dict[str, Any]:
    own = {name: hyperparams[name] for name in _OWN_SCHEDULES if hyperparams.get(name) is not None}
    others = {name: value for name, value in hyperparams.items() if name not in own}
    # Upstream converts only schedules that it knows by name.
    converted = {name: upstream({"learning_rate": value})["learning_rate"] for name, value in own.items()}
    return {**upstream(others), **converted}


def _objective(upstream: AnyFunction, manager: Any, trial: optuna.Trial) -> float:
    if manager.algo in ALGORITHMS:
        trial.set_user_attr(BUDGET, manager.n_timesteps)
        trial.set_user_attr(N_ENVS, manager.n_envs)
    return float(upstream(manager, trial))
