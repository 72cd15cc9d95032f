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
from sb3_ppo_ewma.contrib.callbacks import MaskedEvalCallback, WithMasks

__all__ = [
    "MaskablePPG",
    "MaskablePPGEWMA",
    "MaskablePPOEWMA",
    "MaskableRecurrentPPG",
    "MaskableRecurrentPPGEWMA",
    "MaskableRecurrentPPOEWMA",
    "MaskedEvalCallback",
    "RecurrentPPG",
    "RecurrentPPGEWMA",
    "RecurrentPPOEWMA",
    "WithMasks",
]
