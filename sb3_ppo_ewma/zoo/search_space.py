"""
Optuna search space of PPO-EWMA: the zoo's own for PPO, so that both can be compared, plus the centre of mass of the
EWMA and the objective.
"""

from typing import Any

import optuna
from rl_zoo3.hyperparams_opt import convert_onpolicy_params, sample_ppo_params

from sb3_ppo_ewma.ewma import decay_from_center_of_mass

_OWN = ("prox_center_of_mass", "objective", "kl_coef")


def sample_ppo_ewma_params(
    trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]
) -> dict[str, Any]:
    """
    Sampler of ``ppo_ewma`` and ``ppo_lstm_ewma``. Every parameter is drawn in every trial, also the one that the drawn
    objective does not use: TPE models them jointly only if the space is the same in all trials.

    :param trial: Optuna's trial
    :param n_actions: not used, part of the zoo's interface
    :param n_envs: not used, part of the zoo's interface
    :param additional_args: not used, part of the zoo's interface
    :return: keyword arguments of the algorithm
    """
    sample_ppo_params(trial, n_actions, n_envs, additional_args)
    # In gradient steps: from a proximal policy of one minibatch ago to one of several iterations ago
    trial.suggest_float("prox_center_of_mass", 1.0, 1000.0, log=True)
    trial.suggest_categorical("objective", ["clip", "kl"])
    # The paper's KL objective has 1.
    trial.suggest_float("kl_coef", 0.1, 10.0, log=True)
    hyperparams = convert_ppo_ewma_params(trial.params)
    trial.set_user_attr("prox_decay", hyperparams["prox_decay"])
    return hyperparams


def convert_ppo_ewma_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """
    :param sampled_params: what a trial drew
    :return: keyword arguments of the algorithm, as the sampler returned them
    """
    hyperparams: dict[str, Any] = convert_onpolicy_params(
        {name: value for name, value in sampled_params.items() if name not in _OWN}
    )
    hyperparams["prox_decay"] = decay_from_center_of_mass(sampled_params["prox_center_of_mass"])
    if sampled_params["objective"] == "kl":
        # A negative clip range is the zoo's spelling of None.
        return {**hyperparams, "clip_range": -1.0, "kl_coef": sampled_params["kl_coef"]}
    return {**hyperparams, "kl_coef": 0.0}
