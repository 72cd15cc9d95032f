"""
Hyper-parameters that were tuned for another number of environments than a model has: ``tuned_for_n_envs`` of the
algorithms.
"""

import contextlib
import copy
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_ewma._arguments import check_integer
from sb3_ppo_ewma._parallel.process_group import world_size
from sb3_ppo_ewma.batch_scaling import Rescaled, per_process, rescale
from sb3_ppo_ewma.checkpointing.generators import preserved_generators

# Hyper-parameters that may be others for another number of environments
_FITTED = ("n_steps", "batch_size", "sde_sample_freq", "prox_decay", "advantage_decay", "staleness",
           "n_policy_iterations", "aux_batch_size")  # fmt: skip
# What is built for a number of environments
_BUILT = ("rollout_buffer", "stale_rollouts", "phase_buffer", "_last_lstm_states")


def fit_arguments(model: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """
    To be called by a constructor whose model has its own parameters already.

    :param model: the model under construction, which remembers what is as tuned
    :param arguments: arguments of SB3's constructor by name
    :return: those that are others for the number of environments of ``env``
    :raises TypeError: if ``tuned_for_n_envs`` is not an integer
    :raises ValueError: if it is below 1, or the hyper-parameters cannot be rescaled
    """
    if model.tuned_for_n_envs is None:
        return {}
    settings = {**arguments, **vars(model)}
    model.tuned_hyperparameters = {name: settings[name] for name in _FITTED if name in settings}
    fitted = _fitted(_rescale(settings, number_of_envs(arguments["env"])))
    return {name: value for name, value in fitted.items() if name in arguments}


def fit_to_envs(model: Any) -> None:
    """
    Give a model the hyper-parameters for its number of environments, in a data-parallel training for the environments
    of all processes. Does nothing without an environment, as when a model is loaded only to predict.

    :param model: one of this package's algorithms
    :raises TypeError: if ``tuned_for_n_envs`` is not an integer
    :raises ValueError: if the hyper-parameters cannot be rescaled, or one was set by hand and nobody knows its value
        for ``tuned_for_n_envs`` environments
    """
    if model.tuned_for_n_envs is None:
        model.tuned_hyperparameters = model.fitted_hyperparameters = None
    if model.tuned_for_n_envs is None or model.env is None:
        return
    attributes = vars(model)
    present = {name: attributes[name] for name in _FITTED if name in attributes}
    tuned, fitted = model.tuned_hyperparameters or present, model.fitted_hyperparameters or {}
    # By load(), from the user
    tuned = {**tuned, **{name: value for name, value in present.items() if name in model._given_to_load}}
    result = _rescale({**attributes, **tuned}, model.n_envs)
    for name, value in present.items():
        if name in model._given_to_load or value == fitted.get(name, value):
            continue
        # Set by hand since
        if fitted[name] != tuned[name]:
            raise ValueError(
                f"{name}={value!r} was set by hand for {fitted['n_envs']} environments, where {tuned[name]!r}, tuned "
                f"for {model.tuned_for_n_envs}, had become {fitted[name]!r}: it cannot be rescaled to "
                f"{result.hyperparameters['n_envs']} environments; give load() its value for {model.tuned_for_n_envs}"
            )
        tuned[name] = value
        result = _rescale({**attributes, **tuned}, model.n_envs)
    model.tuned_hyperparameters, model.fitted_hyperparameters = tuned, _fitted(result)
    attributes.update({name: value for name, value in model.fitted_hyperparameters.items() if name != "n_envs"})
    n_envs = result.hyperparameters["n_envs"]
    if model.verbose >= 1 and n_envs != model.tuned_for_n_envs:
        print(f"Hyper-parameters tuned for {model.tuned_for_n_envs} environments, for {n_envs}:\n{result.explanation}")


def check_fits(model: Any) -> None:
    """
    :param model: an algorithm about to learn
    :raises ValueError: if it was built for another number of environments or processes than it has
    """
    if model.tuned_for_n_envs is None:
        return
    total, fitted = model.n_envs * world_size(), model.fitted_hyperparameters or {}
    if fitted.get("n_envs") != total or fitted.get("tuned_for_n_envs") != model.tuned_for_n_envs:
        raise ValueError(
            f"tuned_for_n_envs={model.tuned_for_n_envs}: the model was built for {fitted.get('n_envs')} environments "
            f"in all processes, and there are {total}: build or load it after torch.distributed.init_process_group()"
        )


def change_env(model: Any, env: GymEnv, set_env: Callable[..., None]) -> None:
    """
    Replace the environments by another number of them. Policy, averages, optimisers and counters go on, and kept
    rollouts where they have the size of the new ones.

    :param model: an algorithm with ``tuned_for_n_envs``
    :param env: the new environment
    :param set_env: SB3's method
    :raises ValueError: if the hyper-parameters cannot be rescaled; the model is then as it was
    """
    attributes = vars(model)
    before = dict(attributes)
    try:
        model.n_envs = number_of_envs(env)
        set_env(env, force_reset=True)
        fit_to_envs(model)
        with preserved_generators(model.device):
            fresh = copy.copy(model)
            fresh.seed, fresh.verbose = None, 0
            fresh._setup_model()
        built = {name: each for name, each in vars(fresh).items() if name in _BUILT}
        for name in model._own_buffers:
            kept = before[name]
            if kept is not None and built[name] is not None:
                with contextlib.suppress(ValueError):  # of another size: lost, of which learn() warns
                    built[name] = built[name].restored(kept.pieces(), len(kept), built["rollout_buffer"])
    except BaseException:
        attributes.clear()
        attributes.update(before)
        raise
    attributes.update(built)


def number_of_envs(env: GymEnv | str | None) -> int:
    """
    :param env: environment as SB3's constructors take it
    :return: number of environments that a model of it has
    """
    return env.num_envs if isinstance(env, VecEnv) else 1


def _rescale(settings: Mapping[str, Any], n_envs: int) -> Rescaled:
    """
    :param settings: hyper-parameters as tuned
    :param n_envs: number of environments of this process
    :return: hyper-parameters for the environments of all processes
    """
    tuned_for = settings["tuned_for_n_envs"]
    check_integer("tuned_for_n_envs", tuned_for, minimum=1)
    return rescale({**settings, "n_envs": tuned_for}, Fraction(n_envs * world_size(), tuned_for))


def _fitted(result: Rescaled) -> dict[str, Any]:
    """
    :param result: hyper-parameters for the environments of all processes
    :return: those of this process that depend on their number, with that number and the one they were tuned for
    """
    shares = per_process(result.hyperparameters, world_size())
    names = [name for name in _FITTED if name in shares]
    return {**{name: shares[name] for name in names}, "n_envs": result.hyperparameters["n_envs"],
            "tuned_for_n_envs": shares["tuned_for_n_envs"]}  # fmt: skip
