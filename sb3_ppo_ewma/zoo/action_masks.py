"""
Action masks in the zoo, whose scripts pass none to ``predict``. Here, ``predict`` of a masked algorithm takes them from
the environments that are being evaluated, and a masked algorithm refuses an environment without masks.
"""

import contextlib
import contextvars
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import rl_zoo3.utils
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.utils import ALGOS
from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported
from stable_baselines3.common import callbacks
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_ewma.zoo.patches._replace import AnyFunction, replace_function

# One per thread: a search with --n-jobs evaluates in several.
_evaluated: contextvars.ContextVar[VecEnv | None] = contextvars.ContextVar("evaluated", default=None)


@functools.cache  # once
def install_hooks() -> None:
    """Replace ``predict`` of the masked algorithms, and the functions that make and evaluate environments."""
    replace_function(ExperimentManager, "create_envs", _create_envs)
    replace_function(callbacks, "evaluate_policy", _evaluate_policy)
    replace_function(rl_zoo3.utils, "create_test_env", _create_test_env)
    rl_zoo3.create_test_env = rl_zoo3.utils.create_test_env  # the scripts import it from there
    for owner in {_owner_of_predict(algorithm) for algorithm in ALGOS.values() if takes_masks(algorithm)}:
        replace_function(owner, "predict", _predict)


def takes_masks(algorithm: Any) -> bool:
    """
    :param algorithm: class of an algorithm
    :return: whether its ``predict`` has a parameter ``action_masks``
    """
    return "action_masks" in inspect.signature(algorithm.predict).parameters


def _owner_of_predict(algorithm: Any) -> Any:
    return next(cls for cls in algorithm.__mro__ if "predict" in vars(cls))


@contextlib.contextmanager
def evaluating(env: VecEnv | None) -> Iterator[None]:
    """
    :param env: environments that ``predict`` asks for masks within the context; ``None``: no masks
    """
    token = _evaluated.set(env)
    try:
        yield
    finally:
        _evaluated.reset(token)


def _predict(
    upstream: AnyFunction,
    model: Any,
    observation: Any,
    state: Any = None,
    episode_start: Any = None,
    deterministic: bool = False,
    action_masks: np.ndarray | None = None,
) -> Any:
    env = _evaluated.get()
    if action_masks is None and env is not None:
        _check_masks(env, type(model).__name__)
        action_masks = get_action_masks(env)
    return upstream(model, observation, state, episode_start, deterministic, action_masks=action_masks)


def _evaluate_policy(upstream: AnyFunction, model: Any, env: Any, *args: Any, **kwargs: Any) -> Any:
    with evaluating(env):
        return upstream(model, env, *args, **kwargs)


def _create_test_env(upstream: AnyFunction, *args: Any, **kwargs: Any) -> Any:
    env = upstream(*args, **kwargs)
    _evaluated.set(env)  # a script makes one and evaluates the agent there until it ends
    return env


def _create_envs(upstream: AnyFunction, manager: Any, *args: Any, **kwargs: Any) -> Any:
    env = upstream(manager, *args, **kwargs)
    if takes_masks(ALGOS[manager.algo]):
        try:
            _check_masks(env, manager.algo, manager.env_name.gym_id)
        except ValueError:
            env.close()
            raise
    return env


def _check_masks(env: VecEnv, algo: str, env_id: str = "the environment") -> None:
    """
    :param env: environments
    :param algo: name of the masked algorithm
    :param env_id: name of the environment
    :raises ValueError: if they give no masks
    """
    if not is_masking_supported(env):
        raise ValueError(
            f"{algo} needs action masks, and {env_id} has no method action_masks(): add one, or a wrapper that has it "
            "with env_wrapper, such as sb3_contrib.common.wrappers.ActionMasker, or "
            "sb3_ppo_ewma.envs.action_masks.InfoActionMasker for masks in info['action_mask']"
        )
