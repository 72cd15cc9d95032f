"""
PPO-EWMA, PPG and PPG-EWMA for Stable-Baselines3: decoupled proximal and behaviour policies
(https://arxiv.org/abs/2110.00641), and an auxiliary phase (https://arxiv.org/abs/2009.04416).

The recurrent and the maskable algorithm need sb3-contrib and are imported on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from sb3_ppo_ewma.callbacks.advice import AdviceCallback
from sb3_ppo_ewma.callbacks.noise_scale import NoiseScaleCallback
from sb3_ppo_ewma.callbacks.run_checkpoint import RunCheckpoint, newest_checkpoint
from sb3_ppo_ewma.envs import envpool_env as _envpool_env
from sb3_ppo_ewma.envs.env_state import EnvStateWrapper
from sb3_ppo_ewma.envs.envpool_vec_env import EnvPoolVecEnv, make_envpool_vec_env
from sb3_ppo_ewma.envs.grouped_vec_env import GroupedVecEnv
from sb3_ppo_ewma.envs.remote_vec_env import RemoteVecEnv
from sb3_ppo_ewma.networks import ImpalaCNN, SmallGridCNN
from sb3_ppo_ewma.policies import ImpalaPolicy, PPGCnnPolicy, PPGImpalaPolicy, PPGMultiInputPolicy, PPGPolicy
from sb3_ppo_ewma.ppg import PPG, PPGEWMA, AuxiliaryPhaseMixin
from sb3_ppo_ewma.ppo_ewma import PPOEWMA, EwmaMixin

if TYPE_CHECKING:
    from sb3_ppo_ewma.contrib import (
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

__version__ = "0.1.0"
__all__ = [
    "PPG",
    "PPGEWMA",
    "PPOEWMA",
    "AdviceCallback",
    "AuxiliaryPhaseMixin",
    "EnvPoolVecEnv",
    "EnvStateWrapper",
    "EwmaMixin",
    "GroupedVecEnv",
    "ImpalaCNN",
    "ImpalaPolicy",
    "MaskablePPG",
    "MaskablePPGEWMA",
    "MaskablePPOEWMA",
    "MaskableRecurrentPPG",
    "MaskableRecurrentPPGEWMA",
    "MaskableRecurrentPPOEWMA",
    "NoiseScaleCallback",
    "PPGCnnPolicy",
    "PPGImpalaPolicy",
    "PPGMultiInputPolicy",
    "PPGPolicy",
    "RecurrentPPG",
    "RecurrentPPGEWMA",
    "RecurrentPPOEWMA",
    "RemoteVecEnv",
    "RunCheckpoint",
    "SmallGridCNN",
    "__version__",
    "make_envpool_vec_env",
    "newest_checkpoint",
]

# Gymnasium's make() finds the games, by EnvPool's names, once this package is imported.
_envpool_env.register(_envpool_env.PROCGEN)

# Imported on first use
_CONTRIB = frozenset(name for name in __all__ if name.startswith(("Maskable", "Recurrent")))


def __getattr__(name: str) -> Any:
    if name not in _CONTRIB:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module("sb3_ppo_ewma.contrib")
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("sb3_contrib"):
            raise
        raise ImportError(f"{name} needs sb3-contrib: pip install 'sb3-ppo-ewma[contrib]'") from error
    return getattr(module, name)
