"""
Optuna search spaces: the zoo's space for PPO, for comparison with it, plus the parameters that PPO does not have.

Every trial samples every parameter, even one without effect under the others: TPE models parameters jointly only if all
trials have the same space. A converter sees only the parameters of a trial.

A space is made of parts, each with the parameters of one idea: the moving average, the objective, phases, the critic's
architecture, LSTMs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

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
# Hyper-parameters that a trial stores as user attributes, because its parameters have another form
_SHOWN = ("prox_decay", "n_policy_iterations", "aux_batch_size")

Params = dict[str, Any]


class Part(NamedTuple):
    """
    Part of a search space.

    :param names: names of its parameters
    :param suggest: draws the parameters of a trial, given the number of environments
    :param convert: keyword arguments of the algorithm, given the parameters of a trial and the arguments converted so
        far
    """

    names: tuple[str, ...]
    suggest: Callable[[optuna.Trial, int], None]
    convert: Callable[[Params, Params], Params]


class SearchSpace(NamedTuple):
    """
    The zoo's parameters for PPO, and those of some parts.

    :param sample: sampler, with the parameters that the zoo passes
    :param convert: converts the parameters of a trial to the keyword arguments that the sampler returned
    """

    sample: AnyFunction
    convert: AnyFunction


def search_space(*parts: Part) -> SearchSpace:
    """
    :param parts: parts beside the zoo's parameters for PPO, in the order in which they are drawn and converted
    :return: the space
    """
    names = {name for part in parts for name in part.names}

    def sample(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: Params) -> Params:
        sample_ppo_params(trial, n_actions, n_envs, additional_args)
        for part in parts:
            part.suggest(trial, n_envs)
        hyperparams = convert(trial.params)
        for name in _SHOWN:
            if name in hyperparams:
                trial.set_user_attr(name, hyperparams[name])
        return hyperparams

    def convert(sampled_params: Params) -> Params:
        of_ppo = {name: value for name, value in sampled_params.items() if name not in names}
        hyperparams: Params = convert_onpolicy_params(of_ppo)
        for part in parts:
            hyperparams |= part.convert(sampled_params, hyperparams)
        return hyperparams

    return SearchSpace(sample, convert)


def _suggest_average(trial: optuna.Trial, n_envs: int) -> None:
    # In gradient steps: the proximal policy is between one minibatch and several iterations old.
    trial.suggest_float("prox_center_of_mass", 1.0, 1000.0, log=True)


def _convert_average(sampled: Params, hyperparams: Params) -> Params:
    return {"prox_decay": decay_from_center_of_mass(sampled["prox_center_of_mass"])}


def _suggest_objective(trial: optuna.Trial, n_envs: int) -> None:
    trial.suggest_categorical("objective", ["clip", "kl"])
    # The paper uses 1.
    trial.suggest_float("kl_coef", 0.1, 10.0, log=True)


def _convert_objective(sampled: Params, hyperparams: Params) -> Params:
    if sampled["objective"] == "kl":
        # A negative clip range is the zoo's spelling of None.
        return {"clip_range": -1.0, "kl_coef": sampled["kl_coef"]}
    return {"kl_coef": 0.0}


def _suggest_phases(trial: optuna.Trial, n_envs: int) -> None:
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


def _convert_phases(sampled: Params, hyperparams: Params) -> Params:
    longest = sampled["longest_phase"] // hyperparams["n_steps"]
    return {
        "n_policy_iterations": max(1, min(2 ** sampled["n_policy_iterations_pow"], longest)),
        "aux_batch_size": 2 ** sampled["aux_batch_size_pow"],
        **{name: sampled[name] for name in ("n_aux_epochs", "aux_learning_rate", "beta_clone")},
    }


def _suggest_architecture(trial: optuna.Trial, n_envs: int) -> None:
    trial.suggest_categorical("critic_arch", ["dual", "shared", "detach"])
    # Number of layers of net_arch in the trunk. With vector observations and without a trunk, the three
    # architectures are the same.
    trial.suggest_int("trunk_layers", 0, 1)


def _convert_architecture(sampled: Params, hyperparams: Params) -> Params:
    policy_kwargs = hyperparams["policy_kwargs"]
    policy_net, value_net = (policy_kwargs["net_arch"][name] for name in ("pi", "vf"))  # of equal layers
    trunk_layers = sampled["trunk_layers"]
    architecture = {
        "critic_arch": sampled["critic_arch"],
        "trunk_arch": policy_net[:trunk_layers],
        "net_arch": {"pi": policy_net[trunk_layers:], "vf": value_net[trunk_layers:]},
    }
    return {"policy_kwargs": {**policy_kwargs, **architecture}}


def _suggest_lstm(trial: optuna.Trial, n_envs: int) -> None:
    # sb3-contrib's default is 256.
    trial.suggest_categorical("lstm_hidden_size", [16, 32, 64, 128, 256, 512])
    # sb3-contrib's default is an LSTM of the critic's own. Its two switches exclude each other.
    trial.suggest_categorical("critic_lstm", ["own", "shared", "none"])


def _convert_lstm(sampled: Params, hyperparams: Params) -> Params:
    lstm = {
        "lstm_hidden_size": sampled["lstm_hidden_size"],
        "enable_critic_lstm": sampled["critic_lstm"] == "own",
        "shared_lstm": sampled["critic_lstm"] == "shared",
    }
    return {"policy_kwargs": {**hyperparams["policy_kwargs"], **lstm}}


_AVERAGE = Part(("prox_center_of_mass",), _suggest_average, _convert_average)
_OBJECTIVE = Part(("objective", "kl_coef"), _suggest_objective, _convert_objective)
# Limits phases so that four of them fit into the budget of a trial
_PHASE = Part(
    (
        "n_policy_iterations_pow",
        "longest_phase",
        "n_aux_epochs",
        "aux_batch_size_pow",
        "aux_learning_rate",
        "beta_clone",
    ),
    _suggest_phases,
    _convert_phases,
)
_ARCHITECTURE = Part(("critic_arch", "trunk_layers"), _suggest_architecture, _convert_architecture)
_LSTM = Part(("lstm_hidden_size", "critic_lstm"), _suggest_lstm, _convert_lstm)

# Sampler and converter by the name of the algorithm. Masks change nothing.
SEARCH_SPACES: dict[str, SearchSpace] = {
    "ppo_mask": search_space(),
    **dict.fromkeys(("ppo_ewma", "ppo_mask_ewma"), search_space(_AVERAGE, _OBJECTIVE)),
    **dict.fromkeys(("ppo_lstm_ewma", "ppo_mask_lstm_ewma"), search_space(_AVERAGE, _OBJECTIVE, _LSTM)),
    **dict.fromkeys(("ppg", "ppg_mask"), search_space(_PHASE, _ARCHITECTURE)),
    **dict.fromkeys(("ppg_lstm", "ppg_mask_lstm"), search_space(_PHASE, _LSTM)),
    **dict.fromkeys(("ppg_ewma", "ppg_mask_ewma"), search_space(_PHASE, _ARCHITECTURE, _AVERAGE)),
    **dict.fromkeys(("ppg_lstm_ewma", "ppg_mask_lstm_ewma"), search_space(_PHASE, _LSTM, _AVERAGE)),
}
