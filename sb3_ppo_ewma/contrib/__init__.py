"""Algorithms for sb3-contrib's families: recurrent policies, invalid-action masks, and both."""

from sb3_ppo_ewma.contrib.algorithms import (
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
from sb3_ppo_ewma.contrib.callbacks import MaskableRecurrentEvalCallback, WithMasks

__all__ = [
    "MaskablePPG",
    "MaskablePPGEWMA",
    "MaskablePPOEWMA",
    "MaskableRecurrentEvalCallback",
    "MaskableRecurrentPPG",
    "MaskableRecurrentPPGEWMA",
    "MaskableRecurrentPPOEWMA",
    "RecurrentPPG",
    "RecurrentPPGEWMA",
    "RecurrentPPOEWMA",
    "WithMasks",
]
