"""
``env_kwargs`` of a file of hyper-parameters reach neither evaluation nor ``record_video``, and ``--env-kwargs``
replaces them.

Seen in rl_zoo3 2.9.2. ``ExperimentManager`` takes the arguments of the evaluation environment from the command line
before it reads the file, so the "best" model is that of another task. ``record_video`` reads them from ``args.yml``
only, and ``enjoy`` prefers that file to the complete ``config.yml``. Sources:
https://github.com/DLR-RM/rl-baselines3-zoo/blob/master/rl_zoo3/exp_manager.py and
https://github.com/DLR-RM/rl-baselines3-zoo/blob/master/rl_zoo3/record_video.py.
"""

import inspect
from typing import Any

import rl_zoo3.utils
from rl_zoo3.exp_manager import ExperimentManager

from sb3_ppo_ewma.zoo.patches._replace import AnyFunction, replace_function, upstream_source


def is_needed() -> bool:
    """:return: whether the command line replaces the ``env_kwargs`` of the file"""
    return '{"env_kwargs": self.env_kwargs}' in upstream_source(ExperimentManager.read_hyperparameters)


def apply() -> None:
    """
    Complete the file's arguments by those of the command line: by ``--env-kwargs`` in training; in evaluation by
    ``--eval-env-kwargs``, or else ``--env-kwargs``. Save the result, so that other scripts find it.
    """
    replace_function(ExperimentManager, "read_hyperparameters", _read_hyperparameters)
    replace_function(rl_zoo3.utils, "create_test_env", _create_test_env)
    rl_zoo3.create_test_env = rl_zoo3.utils.create_test_env  # the scripts import it from there


def _read_hyperparameters(upstream: AnyFunction, manager: Any) -> Any:
    given, manager.env_kwargs = manager.env_kwargs, {}  # upstream then leaves those of the file
    try:
        both = hyperparams, _ = upstream(manager)
    finally:
        manager.env_kwargs = given
    of_file = hyperparams.get("env_kwargs") or {}
    if not isinstance(of_file, dict):
        raise ValueError(f"{manager.config}: env_kwargs must be a mapping of names to values, got {of_file!r}")
    for_evaluation = given if manager._eval_env_kwargs_args is None else manager._eval_env_kwargs_args
    manager.env_kwargs = {**of_file, **given}
    manager.eval_env_kwargs = {**of_file, **for_evaluation}
    if "env_kwargs" in hyperparams:
        for each in both:
            each["env_kwargs"] = manager.env_kwargs
    if manager.env_kwargs and hasattr(manager.args, "env_kwargs"):
        manager.args.env_kwargs = manager.env_kwargs  # saved in args.yml
    return both


def _create_test_env(upstream: AnyFunction, env_id: str, *args: Any, **kwargs: Any) -> Any:
    given = inspect.signature(upstream).bind(env_id, *args, **kwargs).arguments
    # Of agents that were trained without this patch
    of_file = (given.get("hyperparams") or {}).get("env_kwargs") or {}
    return upstream(**{**given, "env_kwargs": {**of_file, **(given.get("env_kwargs") or {})}})
