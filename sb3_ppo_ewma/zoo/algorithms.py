"""Names of our algorithms in the zoo, and their files of hyper-parameters."""

from pathlib import Path

from sb3_contrib import MaskablePPO
from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_ppo_ewma import (
    PPG,
    PPGEWMA,
    PPOEWMA,
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

ALGORITHMS: dict[str, type[BaseAlgorithm]] = {
    "ppo_ewma": PPOEWMA,
    "ppo_lstm_ewma": RecurrentPPOEWMA,
    "ppo_mask_ewma": MaskablePPOEWMA,
    "ppo_mask_lstm_ewma": MaskableRecurrentPPOEWMA,
    "ppg": PPG,
    "ppg_lstm": RecurrentPPG,
    "ppg_mask": MaskablePPG,
    "ppg_mask_lstm": MaskableRecurrentPPG,
    "ppg_ewma": PPGEWMA,
    "ppg_lstm_ewma": RecurrentPPGEWMA,
    "ppg_mask_ewma": MaskablePPGEWMA,
    "ppg_mask_lstm_ewma": MaskableRecurrentPPGEWMA,
}

# sb3-contrib's algorithm to compare the masked ones with, which the zoo lacks
BASELINES: dict[str, type[BaseAlgorithm]] = {"ppo_mask": MaskablePPO}

# More files for ppo_ewma: settings with one policy epoch, and settings that Optuna found
ONE_EPOCH, TUNED = "ppo_ewma_one_epoch", "ppo_ewma_tuned"

# Algorithms without a file of their own, and those whose entries they share. Shared entries do not give prox_decay:
# each algorithm takes its default.
SHARED_FILES = {
    "ppo_mask_ewma": "ppo_mask",
    "ppg_lstm_ewma": "ppg_lstm",
    "ppg_mask_ewma": "ppg_mask",
    "ppg_mask_lstm_ewma": "ppg_mask_lstm",
}


def hyperparameter_file(name: str) -> Path:
    """
    :param name: an algorithm, ``ONE_EPOCH`` or ``TUNED``, or the path of a file such as ``procgen/ppg_256``
    :return: path of the file, which may not exist: in the installed package, or in the repository of an editable
        install
    """
    file = f"{SHARED_FILES.get(name, name)}.yml"
    package = Path(__file__).parents[1]
    installed = package / "zoo_hyperparams" / file
    return installed if installed.is_file() else package.parent / "zoo_hyperparams" / file
