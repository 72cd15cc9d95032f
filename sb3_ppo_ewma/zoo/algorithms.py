"""Names of our algorithms in the zoo, and their files of hyper-parameters."""

from pathlib import Path

from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_ppo_ewma import PPG, PPGEWMA, PPOEWMA, RecurrentPPOEWMA

# MaskablePPOEWMA is missing: the zoo passes no action masks.
ALGORITHMS: dict[str, type[BaseAlgorithm]] = {
    "ppo_ewma": PPOEWMA,
    "ppo_lstm_ewma": RecurrentPPOEWMA,
    "ppg": PPG,
    "ppg_ewma": PPGEWMA,
}

# More files for ppo_ewma: settings with one policy epoch, and settings that Optuna found
ONE_EPOCH, TUNED = "ppo_ewma_one_epoch", "ppo_ewma_tuned"


def hyperparameter_file(name: str) -> Path:
    """
    :param name: one of ``ALGORITHMS``, ``ONE_EPOCH`` or ``TUNED``, or the path of a file such as ``procgen/ppg_256``
    :return: path of the file, which may not exist: in the installed package, or in the repository of an editable
        install
    """
    package = Path(__file__).parents[1]
    installed = package / "zoo_hyperparams" / f"{name}.yml"
    return installed if installed.is_file() else package.parent / "zoo_hyperparams" / f"{name}.yml"
