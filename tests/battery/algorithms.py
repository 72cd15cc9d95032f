"""
The list of algorithms under test.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.type_aliases import GymEnv

from sb3_ppo_ewma import PPOEWMA

# Two minibatches per epoch, two epochs: enough for every branch, a few milliseconds.
QUICK: dict[str, Any] = {"n_steps": 16, "batch_size": 8, "n_epochs": 2, "seed": 0, "device": "cpu"}
POLICY_KWARGS: dict[str, dict[str, Any]] = {
    "MlpPolicy": {"net_arch": [8]},
    "CnnPolicy": {"net_arch": [8], "features_extractor_kwargs": {"features_dim": 8}},
    "MultiInputPolicy": {"net_arch": [8], "features_extractor_kwargs": {"cnn_output_dim": 8}},
}


@dataclass(frozen=True)
class Algorithm:
    """
    An entry of the battery.

    :param cls: the class, used in place of SB3's PPO
    :param kwargs: arguments besides PPO's
    :param label: suffix of the test's name, for a second entry of the same class
    :param policies: the names of its policies
    :param own: False for SB3's own PPO, which has none of this package's features
    """

    cls: type[PPO]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""
    policies: tuple[str, ...] = ("MlpPolicy", "CnnPolicy", "MultiInputPolicy")
    own: bool = True

    def __str__(self) -> str:
        return self.cls.__name__ + self.label

    def make(self, env: GymEnv | str, policy: Any = None, **overrides: Any) -> PPO:
        """
        :param env: the environment
        :param policy: name or class; by default the name that fits the observation space
        :param overrides: arguments that replace the quick defaults; ``policy_kwargs`` are merged into them
        :return: a small, quick model
        """
        env = make_vec_env(env) if isinstance(env, str) else env
        fitting = policy_name(env.observation_space)
        kwargs = {**QUICK, **self.kwargs, **overrides}
        kwargs["policy_kwargs"] = {**POLICY_KWARGS[fitting], **(overrides.get("policy_kwargs") or {})}
        return self.cls(policy or fitting, env, **kwargs)


def policy_name(observation_space: spaces.Space[Any]) -> str:
    """
    :param observation_space: of the environment
    :return: the policy that fits it
    """
    if isinstance(observation_space, spaces.Dict):
        return "MultiInputPolicy"
    return "CnnPolicy" if is_image_space(observation_space) else "MlpPolicy"


ALGORITHMS = [
    Algorithm(PPOEWMA),
    Algorithm(
        PPOEWMA,
        {"kl_coef": 0.5, "kl_estimator": "analytic", "n_epochs_value": 3, "recompute_advantages": True},
        label="-switches",
    ),
]
if os.environ.get("BATTERY_CONTROL"):
    ALGORITHMS.append(Algorithm(PPO, own=False))
