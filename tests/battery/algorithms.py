"""
The list of algorithms under test.
"""

import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from gymnasium import spaces
from sb3_contrib import RecurrentPPO
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.type_aliases import GymEnv

from sb3_ppo_ewma import (
    PPG,
    PPGEWMA,
    PPOEWMA,
    AuxiliaryPhaseMixin,
    MaskablePPG,
    MaskablePPGEWMA,
    MaskablePPOEWMA,
    MaskableRecurrentPPG,
    MaskableRecurrentPPGEWMA,
    MaskableRecurrentPPOEWMA,
    RecurrentPPG,
    RecurrentPPGEWMA,
    RecurrentPPOEWMA,
)

# Two minibatches per epoch, two epochs: enough for every branch, a few milliseconds.
QUICK: dict[str, Any] = {"n_steps": 16, "batch_size": 8, "n_epochs": 2, "seed": 0, "device": "cpu"}
# An auxiliary phase after every second rollout, with two epochs of four minibatches
PHASES: dict[str, Any] = {"n_policy_iterations": 2, "n_aux_epochs": 2, "aux_batch_size": 8, "aux_learning_rate": 3e-4}
SWITCHES: dict[str, Any] = {
    "kl_coef": 0.5,
    "kl_estimator": "analytic",
    "n_epochs_value": 3,
    "recompute_advantages": True,
}
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
    :param policy_kwargs: arguments of its policies
    :param label: suffix of the test's name, for a second entry of the same class
    :param own: False for SB3's own PPO, which has none of this package's features
    """

    cls: type[PPO]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    policy_kwargs: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""
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
        given = overrides.get("policy_kwargs") or {}
        kwargs["policy_kwargs"] = {**POLICY_KWARGS[fitting], **self.policy_kwargs, **given}
        if self.is_recurrent:
            fitting = fitting.replace("Policy", "LstmPolicy")
            kwargs["policy_kwargs"] = {"lstm_hidden_size": 4, **kwargs["policy_kwargs"]}
        return self.cls(policy or fitting, env, **kwargs)

    @property
    def has_phases(self) -> bool:
        """:return: whether it has auxiliary phases"""
        return issubclass(self.cls, AuxiliaryPhaseMixin)

    @property
    def is_recurrent(self) -> bool:
        """:return: whether its policies have an LSTM"""
        return issubclass(self.cls, RecurrentPPO)

    @property
    def has_masks(self) -> bool:
        """:return: whether it takes action masks"""
        return "Maskable" in self.cls.__name__

    @property
    def has_average(self) -> bool:
        """:return: whether its proximal policy is an average"""
        if not self.own:
            return False
        default = inspect.signature(self.cls).parameters["prox_decay"].default
        return self.kwargs.get("prox_decay", default) is not None

    def with_plain_policy(self) -> "Algorithm":
        """:return: the same algorithm; for vector observations, its policy has the networks of PPO's"""
        return replace(self, policy_kwargs={})

    def sharing(self, share: bool) -> dict[str, Any]:
        """
        :param share: whether policy and value function use the same features extractor
        :return: the arguments of the policy for it, without layers between it and the rest
        """
        if self.has_phases:
            return {"critic_arch": "shared" if share else "dual", "trunk_arch": None}
        return {"share_features_extractor": share}

    def no_learning(self) -> dict[str, float]:
        """:return: learning rates of zero"""
        return {"learning_rate": 0.0, **({"aux_learning_rate": 0.0} if self.has_phases else {})}

    def normalizing_as_ppo(self) -> dict[str, None]:
        """:return: arguments for advantages that are normalised per minibatch, or not at all"""
        return {"advantage_decay": None} if self.own else {}

    def derived(self, mixin: type) -> type[ActorCriticPolicy]:
        """
        :param mixin: overrides methods of ``ActorCriticPolicy``
        :return: with it, a policy for vector observations that the algorithm accepts
        """
        return _derived(mixin, self.cls.policy_aliases["MlpPolicy"])


@cache
def _derived(mixin: type, base: type[ActorCriticPolicy]) -> type[ActorCriticPolicy]:
    return type(mixin.__name__, (mixin, base), {"__module__": mixin.__module__})


def policy_name(observation_space: spaces.Space[Any]) -> str:
    """
    :param observation_space: of the environment
    :return: the policy that fits it
    """
    if isinstance(observation_space, spaces.Dict):
        return "MultiInputPolicy"
    return "CnnPolicy" if is_image_space(observation_space) else "MlpPolicy"


# PPG with a critic of its own, and with a detached one behind layers of the trunk. The third architecture, "shared",
# has PPOEWMA's networks and computes the same until the first auxiliary phase.
ALGORITHMS = [
    Algorithm(PPOEWMA),
    Algorithm(PPOEWMA, SWITCHES, label="-switches"),
    Algorithm(PPG, PHASES),
    Algorithm(PPGEWMA, {**PHASES, **SWITCHES}, {"critic_arch": "detach", "trunk_arch": [8]}, label="-switches"),
]
# Those of sb3-contrib's families have batteries of their own.
CONTRIB = [
    Algorithm(RecurrentPPOEWMA),
    Algorithm(RecurrentPPG, PHASES),
    Algorithm(RecurrentPPGEWMA, {**PHASES, **SWITCHES}, label="-switches"),
    Algorithm(MaskablePPOEWMA),
    Algorithm(MaskablePPG, PHASES),
    Algorithm(MaskablePPGEWMA, {**PHASES, **SWITCHES}, {"critic_arch": "detach", "trunk_arch": [8]}, label="-switches"),
    Algorithm(MaskableRecurrentPPOEWMA),
    Algorithm(MaskableRecurrentPPG, PHASES),
    Algorithm(MaskableRecurrentPPGEWMA, {**PHASES, **SWITCHES}, label="-switches"),
]
RECURRENT = [algo for algo in CONTRIB if algo.is_recurrent]
MASKABLE = [algo for algo in CONTRIB if algo.has_masks]
if os.environ.get("BATTERY_CONTROL"):
    ALGORITHMS.append(Algorithm(PPO, own=False))
