"""
A policy that does not fit the observations, such as the ``default`` entry's ``MlpLstmPolicy`` for dictionaries, is an
``AttributeError`` of a layer, and an unknown one is not told which there are.

Seen in rl_zoo3 2.9.2 with Stable-Baselines3 2.9.2, which checks only some names. Source: ``BaseAlgorithm`` in
https://github.com/DLR-RM/stable-baselines3/blob/master/stable_baselines3/common/base_class.py.
"""

import difflib
from typing import Any

from gymnasium import spaces
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.utils import ALGOS
from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_ppo_ewma.zoo.patches._replace import AnyFunction, replace_function, upstream_source


def is_needed() -> bool:
    """:return: whether Stable-Baselines3's error does not list the policies"""
    return 'raise ValueError(f"Policy {policy_name} unknown")' in upstream_source(BaseAlgorithm._get_policy_from_name)


def apply() -> None:
    """Raise a ``ValueError`` that names the policy to use."""
    replace_function(ExperimentManager, "_preprocess_action_noise", _preprocess_action_noise)


def _preprocess_action_noise(
    upstream: AnyFunction, manager: Any, hyperparams: dict[str, Any], saved: dict[str, Any], env: Any
) -> Any:
    policy = hyperparams.get("policy")
    # Upstream has replaced names with a module by their classes. A trained agent keeps the policy that it has.
    if isinstance(policy, str) and not manager.continue_training:
        try:
            _check(policy, manager, env.observation_space)
        except ValueError:
            env.close()
            raise
    return upstream(manager, hyperparams, saved, env)


def _check(policy: str, manager: Any, space: spaces.Space[Any]) -> None:
    known = list(ALGOS[manager.algo].policy_aliases)
    if policy not in known:
        near = difflib.get_close_matches(policy, known, n=1)
        hint = f". Did you mean {near[0]!r}?" if near else ""
        allowed = ", ".join(known)
        raise ValueError(
            f"policy of {manager.algo} must be one of {allowed}, or my_module.MyPolicy, got {policy!r}{hint}"
        )
    takes_dict, is_dict = policy.startswith("MultiInput"), isinstance(space, spaces.Dict)
    if takes_dict == is_dict:
        return
    fitting = [name for name in known if name.startswith("MultiInput") == is_dict]
    if fitting:
        raise ValueError(
            f"{policy} is for {'dictionaries' if takes_dict else 'other observations than dictionaries'}, and those of "
            f"{manager.env_name.gym_id} are {space}: use {' or '.join(fitting)} (-params policy:{fitting[0]})"
        )
