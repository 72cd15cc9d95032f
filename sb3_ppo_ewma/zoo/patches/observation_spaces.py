"""
Observations that Stable-Baselines3 does not take, such as tuples or MiniGrid's with a text, are a "'NoneType' object is
not iterable".

Seen in rl_zoo3 2.9.2 with Stable-Baselines3 2.9.2: ``create_envs`` makes arrays of the shape of every part before
anything looks at the spaces. Source:
https://github.com/DLR-RM/stable-baselines3/blob/master/stable_baselines3/common/vec_env/dummy_vec_env.py.
"""

from typing import Any

import gymnasium as gym
from gymnasium import spaces
from rl_zoo3.exp_manager import ExperimentManager
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_ppo_ewma.zoo.patches._replace import AnyFunction, replace_function, upstream_source

_SUPPORTED = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)


def is_needed() -> bool:
    """:return: whether the arrays are made of whatever shapes there are"""
    return "np.zeros((self.num_envs, *tuple(shapes[k]))" in upstream_source(DummyVecEnv.__init__)


def apply() -> None:
    """Raise a ``ValueError`` that names the observations and what converts them."""
    replace_function(ExperimentManager, "create_envs", _create_envs)


def _create_envs(upstream: AnyFunction, manager: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        env = upstream(manager, *args, **kwargs)
    except (TypeError, NotImplementedError):
        _check(manager, _space_of_one(manager))
        raise
    try:
        _check(manager, env.observation_space)
    except ValueError:
        env.close()
        raise
    return env


def _space_of_one(manager: Any) -> spaces.Space[Any]:
    env = gym.spec(manager.env_name.gym_id).make(**manager.env_kwargs)
    env = manager.env_wrapper(env) if manager.env_wrapper is not None else env
    env.close()
    return env.observation_space


def _check(manager: Any, space: spaces.Space[Any]) -> None:
    parts = space.spaces.values() if isinstance(space, spaces.Dict) else [space]
    if not all(isinstance(part, _SUPPORTED) for part in parts):
        raise ValueError(
            f"observations of {manager.env_name.gym_id} are {space}: Stable-Baselines3 takes Box, Discrete, "
            "MultiDiscrete, MultiBinary, and a Dict of these. Convert them with an env_wrapper, such as "
            "gymnasium.wrappers.FlattenObservation, or minigrid.wrappers.FlatObsWrapper for MiniGrid"
        )
