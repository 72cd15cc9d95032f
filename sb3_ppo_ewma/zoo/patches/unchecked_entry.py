"""
Values that an entry of hyper-parameters cannot have are taken for others, or raise a bare traceback.

Seen in rl_zoo3 2.9.2. ``exp_0.1`` and ``cos_1e-3`` are linear schedules, ``learning_rate: true`` is 1,
``normalize: 5`` normalises, ``use_sde: 'false'`` is true, ``n_timesteps: 0`` trains nothing. ``ExperimentManager``
checks neither the zoo's own keys nor the algorithm's. Source:
https://github.com/DLR-RM/rl-baselines3-zoo/blob/master/rl_zoo3/exp_manager.py.
"""

import inspect
import math
import re
from collections.abc import Mapping
from numbers import Real
from typing import Any

import rl_zoo3.utils
from rl_zoo3 import exp_manager
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.utils import ALGOS

from sb3_ppo_ewma._arguments import check_integer
from sb3_ppo_ewma.zoo import options
from sb3_ppo_ewma.zoo.patches._replace import AnyFunction, replace_function, upstream_source
from sb3_ppo_ewma.zoo.values import Parameter, check_env_kwargs, check_value, parameters_of

_SCHEDULES = ("learning_rate", "clip_range", "clip_range_vf", "delta_std", "aux_learning_rate")
_LINEAR = re.compile(r"lin_(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
# Mappings, or text that upstream evaluates to one
_MAPPINGS = ("policy_kwargs", "replay_buffer_kwargs", "monitor_kwargs")
# Text that upstream evaluates to something else
_EVALUATED = ("replay_buffer_class",)


def is_needed() -> bool:
    """:return: whether every text with an underscore is a linear schedule"""
    return '_schedule, initial_value = hyperparams[key].split("_")' in upstream_source(
        ExperimentManager._preprocess_schedules
    )


def apply() -> None:
    """Raise a ``ValueError`` that names the file, the entry and the key."""
    replace_function(ExperimentManager, "read_hyperparameters", _read_hyperparameters)
    replace_function(ExperimentManager, "_preprocess_hyperparams", _preprocess_hyperparams)
    replace_function(rl_zoo3.utils, "create_test_env", _create_test_env)
    rl_zoo3.create_test_env = rl_zoo3.utils.create_test_env  # the scripts import it from there


def _read_hyperparameters(upstream: AnyFunction, manager: Any) -> Any:
    both = hyperparams, _ = upstream(manager)
    parameters = parameters_of(ALGOS[manager.algo])
    for name, value in hyperparams.items():
        try:
            _check(name, value, parameters)
        except (TypeError, ValueError) as error:
            is_given = name in (manager.custom_hyperparams or {})
            source = "-params" if is_given else f"{manager.config}, the entry of {manager.env_name.gym_id}"
            raise ValueError(f"{source}: {error}") from error
    if options.current.vec_env != options.ENVPOOL:  # which checks its options itself
        for env_kwargs in (manager.env_kwargs, manager.eval_env_kwargs):
            check_env_kwargs(manager.env_name.gym_id, env_kwargs)
    return both


def _preprocess_hyperparams(upstream: AnyFunction, manager: Any, hyperparams: dict[str, Any]) -> Any:
    if manager.n_timesteps > 0:
        hyperparams.setdefault("n_timesteps", manager.n_timesteps)  # upstream removes it
    elif "n_timesteps" not in hyperparams:
        entry = f"{manager.config}, the entry of {manager.env_name.gym_id}"
        raise ValueError(f"{entry}: n_timesteps is missing: add it, or give the number of steps with -n")
    return upstream(manager, hyperparams)


def _create_test_env(upstream: AnyFunction, env_id: str, *args: Any, **kwargs: Any) -> Any:
    if options.current.vec_env != options.ENVPOOL:
        given = inspect.signature(upstream).bind(env_id, *args, **kwargs).arguments
        check_env_kwargs(env_id, given.get("env_kwargs") or {})
    return upstream(env_id, *args, **kwargs)


def _check(name: str, value: Any, parameters: Mapping[str, Parameter]) -> None:
    """
    :param name: name of a hyper-parameter
    :param value: its value in a file, in a trial or on the command line
    :param parameters: parameters of the algorithm
    :raises TypeError: if the value has a type that the hyper-parameter cannot have
    :raises ValueError: if the hyper-parameter cannot have the value
    """
    if name in _SCHEDULES:
        _check_schedule(name, value)
    elif name == "normalize":
        _check_normalize(value)
    elif name == "n_timesteps":
        if not _is_number(value) or not 1 <= float(value) < math.inf:
            raise ValueError(f"n_timesteps must be a number of steps, at least 1, got {value!r}")
    elif name == "n_envs" or (name == "frame_stack" and value is not None):
        check_integer(name, value, minimum=1)
    elif name in _MAPPINGS:
        if value is not None and not isinstance(value, str | Mapping):
            raise ValueError(f"{name} must be a mapping of names to values, got {value!r}")
    elif name in parameters and name not in _EVALUATED:
        check_value(name, value, parameters[name])


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real)


def _check_schedule(name: str, value: Any) -> None:
    is_linear = isinstance(value, str) and _LINEAR.fullmatch(value)
    if value is not None and not _is_number(value) and not is_linear:
        raise ValueError(f"{name} must be a number, or lin_NUMBER for a schedule to 0, got {value!r}")


def _check_normalize(value: Any) -> None:
    if value is None or isinstance(value, bool | Mapping):
        return
    try:
        evaluated = eval(value, vars(exp_manager)) if isinstance(value, str) else None  # as upstream does later
    except Exception:
        evaluated = None
    if not isinstance(evaluated, Mapping):
        raise ValueError(f"normalize must be True, False, or a mapping of VecNormalize's arguments, got {value!r}")
