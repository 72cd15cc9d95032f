"""The algorithms by the names they have in the zoo, and where their hyper-parameters are."""

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


# Of ppo_ewma, with one policy epoch
ONE_EPOCH = "ppo_ewma_one_epoch"


def hyperparameter_file(name: str) -> Path:
    """
    :param name: one of ``ALGORITHMS``, or ``ONE_EPOCH``
    :return: its file of hyper-parameters: in the installed package, or in the repository of an editable install
    """
    package = Path(__file__).parents[1]
    installed = package / "zoo_hyperparams" / f"{name}.yml"
    return installed if installed.is_file() else package.parent / "zoo_hyperparams" / f"{name}.yml"
