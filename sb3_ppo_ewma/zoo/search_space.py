"""
Optuna search spaces: the zoo's space for PPO, for comparison with it, plus the parameters that PPO does not have.

Every trial samples every parameter, even one without effect under the others: TPE models parameters jointly only if all
trials have the same space. A converter sees only the parameters of a trial.
"""

from typing import Any

import optuna
from rl_zoo3.hyperparams_opt import convert_onpolicy_params, sample_ppo_params

from sb3_ppo_ewma.ewma import decay_from_center_of_mass
from sb3_ppo_ewma.zoo.patches._replace import AnyFunction

# User attribute of a trial: steps of its training, which the zoo does not pass to its samplers
BUDGET = "n_timesteps"
# User attribute of a trial: number of its environments
N_ENVS = "n_envs"
# Without that attribute: a common budget of the zoo's short tasks
_DEFAULT_BUDGET = 100_000
_PHASES = 4  # the budget is long enough for this number of phases, unless a rollout is longer than a phase may be

_PPO_EWMA = ("prox_center_of_mass", "objective", "kl_coef")
_PPG = (
    "n_policy_iterations_pow",
    "longest_phase",
    "n_aux_epochs",
    "aux_batch_size_pow",
    "aux_learning_rate",
    "beta_clone",
    "critic_arch",
    "trunk_layers",
)


def sample_ppo_ewma_params(
    trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]
) -> dict[str, Any]:
    """
    Sampler of ``ppo_ewma`` and ``ppo_lstm_ewma``.

    :param trial: Optuna's trial
    :param n_actions: not used, part of the zoo's interface
    :param n_envs: not used, part of the zoo's interface
    :param additional_args: not used, part of the zoo's interface
    :return: keyword arguments of the algorithm
    """
    sample_ppo_params(trial, n_actions, n_envs, additional_args)
    _suggest_center_of_mass(trial)
    trial.suggest_categorical("objective", ["clip", "kl"])
    # The paper uses 1.
    trial.suggest_float("kl_coef", 0.1, 10.0, log=True)
    hyperparams = convert_ppo_ewma_params(trial.params)
    trial.set_user_attr("prox_decay", hyperparams["prox_decay"])
    return hyperparams


def convert_ppo_ewma_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """
    :param sampled_params: parameters of a trial
    :return: keyword arguments of the algorithm, equal to those that the sampler returned
    """
    hyperparams = _convert_ppo_params(sampled_params, without=_PPO_EWMA)
    hyperparams["prox_decay"] = decay_from_center_of_mass(sampled_params["prox_center_of_mass"])
    if sampled_params["objective"] == "kl":
        # A negative clip range is the zoo's spelling of None.
        return {**hyperparams, "clip_range": -1.0, "kl_coef": sampled_params["kl_coef"]}
    return {**hyperparams, "kl_coef": 0.0}


def sample_ppg_params(
    trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]
) -> dict[str, Any]:
    """
    Sampler of ``ppg``. It limits phases so that four of them fit into the budget of a trial.

    :param trial: Optuna's trial, whose user attribute ``n_timesteps`` is the budget
    :param n_actions: not used, part of the zoo's interface
    :param n_envs: number of environments
    :param additional_args: not used, part of the zoo's interface
    :return: keyword arguments of the algorithm
    """
    _suggest_ppg_params(trial, n_actions, n_envs, additional_args)
    return _with_user_attrs(trial, convert_ppg_params(trial.params))


def convert_ppg_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """
    :param sampled_params: parameters of a trial
    :return: keyword arguments of the algorithm, equal to those that the sampler returned
    """
    hyperparams = _convert_ppo_params(sampled_params, without=_PPG)
    longest = sampled_params["longest_phase"] // hyperparams["n_steps"]
    policy_kwargs = hyperparams["policy_kwargs"]
    policy_net, value_net = (policy_kwargs["net_arch"][name] for name in ("pi", "vf"))  # of equal layers
    trunk_layers = sampled_params["trunk_layers"]
    return {
        **hyperparams,
        "n_policy_iterations": max(1, min(2 ** sampled_params["n_policy_iterations_pow"], longest)),
        "aux_batch_size": 2 ** sampled_params["aux_batch_size_pow"],
        **{name: sampled_params[name] for name in ("n_aux_epochs", "aux_learning_rate", "beta_clone")},
        "policy_kwargs": {
            **policy_kwargs,
            "critic_arch": sampled_params["critic_arch"],
            "trunk_arch": policy_net[:trunk_layers],
            "net_arch": {"pi": policy_net[trunk_layers:], "vf": value_net[trunk_layers:]},
        },
    }


def sample_ppg_ewma_params(
    trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]
) -> dict[str, Any]:
    """
    Sampler of ``ppg_ewma``: the parameters of ``ppg`` and the centre of mass of the EWMA.

    :param trial: Optuna's trial, whose user attribute ``n_timesteps`` is the budget
    :param n_actions: not used, part of the zoo's interface
    :param n_envs: number of environments
    :param additional_args: not used, part of the zoo's interface
    :return: keyword arguments of the algorithm
    """
    _suggest_ppg_params(trial, n_actions, n_envs, additional_args)
    _suggest_center_of_mass(trial)
    hyperparams = _with_user_attrs(trial, convert_ppg_ewma_params(trial.params))
    trial.set_user_attr("prox_decay", hyperparams["prox_decay"])
    return hyperparams


def convert_ppg_ewma_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """
    :param sampled_params: parameters of a trial
    :return: keyword arguments of the algorithm, equal to those that the sampler returned
    """
    ppg_params = {name: value for name, value in sampled_params.items() if name != "prox_center_of_mass"}
    prox_decay = decay_from_center_of_mass(sampled_params["prox_center_of_mass"])
    return {**convert_ppg_params(ppg_params), "prox_decay": prox_decay}


def _suggest_ppg_params(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> None:
    sample_ppo_params(trial, n_actions, n_envs, additional_args)
    # From 2 to the paper's 32
    trial.suggest_int("n_policy_iterations_pow", 1, 5)
    # In steps of one environment. A range of one value, so that the converter sees it among the parameters.
    longest_phase = trial.user_attrs.get(BUDGET, _DEFAULT_BUDGET) // n_envs // _PHASES
    trial.suggest_int("longest_phase", longest_phase, longest_phase)
    # The range of the paper's ablation; its default is 6.
    trial.suggest_int("n_aux_epochs", 1, 9)
    # From 32 to the paper's 4096
    trial.suggest_int("aux_batch_size_pow", 5, 12)
    # Like PPO's learning rate above: the paper uses one for both.
    trial.suggest_float("aux_learning_rate", 1e-5, 0.002, log=True)
    # The paper uses 1.
    trial.suggest_float("beta_clone", 0.1, 10.0, log=True)
    trial.suggest_categorical("critic_arch", ["dual", "shared", "detach"])
    # Number of layers of net_arch in the trunk. With vector observations and without a trunk, the three
    # architectures are the same.
    trial.suggest_int("trunk_layers", 0, 1)


def _suggest_center_of_mass(trial: optuna.Trial) -> None:
    # In gradient steps: the proximal policy is between one minibatch and several iterations old.
    trial.suggest_float("prox_center_of_mass", 1.0, 1000.0, log=True)


def _convert_ppo_params(sampled_params: dict[str, Any], without: tuple[str, ...]) -> dict[str, Any]:
    ppo_params = {name: value for name, value in sampled_params.items() if name not in without}
    hyperparams: dict[str, Any] = convert_onpolicy_params(ppo_params)
    return hyperparams


def _with_user_attrs(trial: optuna.Trial, hyperparams: dict[str, Any]) -> dict[str, Any]:
    for name in ("n_policy_iterations", "aux_batch_size"):
        trial.set_user_attr(name, hyperparams[name])
    return hyperparams


# Sampler and converter by the name of the algorithm
SEARCH_SPACES: dict[str, tuple[AnyFunction, AnyFunction]] = {
    "ppo_ewma": (sample_ppo_ewma_params, convert_ppo_ewma_params),
    "ppo_lstm_ewma": (sample_ppo_ewma_params, convert_ppo_ewma_params),
    "ppg": (sample_ppg_params, convert_ppg_params),
    "ppg_ewma": (sample_ppg_ewma_params, convert_ppg_ewma_params),
}
