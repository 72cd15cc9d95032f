"""
Hyper-parameters that were tuned for another number of environments than a model has: ``tuned_for_n_envs`` of the
algorithms.
"""

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import Any

from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_ewma._arguments import check_integer
from sb3_ppo_ewma._parallel.process_group import place
from sb3_ppo_ewma.batch_scaling import Rescaled, per_process, rescale
from sb3_ppo_ewma.checkpointing.generators import preserved_generators
from sb3_ppo_ewma.checkpointing.rollout_files import OtherSizeError

# Hyper-parameters that may be others for another number of environments
_FITTED = ("n_steps", "batch_size", "sde_sample_freq", "prox_decay", "advantage_decay", "staleness",
           "max_policy_lag", "n_policy_iterations", "aux_batch_size")  # fmt: skip
# What is built for a number of environments
_BUILT = ("rollout_buffer", "stale_rollouts", "phase_buffer", "_last_lstm_states")


def fit_to_envs(model: Any) -> None:
    """
    Give a model the hyper-parameters for its number of environments, in a data-parallel training for the environments
    of all processes. Without an environment, as when a model is loaded only to predict, they stay what they are.

    :param model: one of this package's algorithms
    :raises TypeError: if ``tuned_for_n_envs`` is not an integer
    :raises ValueError: if the hyper-parameters cannot be rescaled, or one was set by hand and nobody knows its value
        for ``tuned_for_n_envs`` environments
    """
    if model.tuned_for_n_envs is None:
        model.tuned_hyperparameters = model.fitted_hyperparameters = None
        return
    attributes = vars(model)
    present = {name: attributes[name] for name in _FITTED if name in attributes}
    given = {name: present[name] for name in model._given_to_load if name in present}
    if given and model.tuned_hyperparameters is not None:  # as tuned, and nothing is fitted to them yet
        model.tuned_hyperparameters = {**model.tuned_hyperparameters, **given}
        model.fitted_hyperparameters = {**model.fitted_hyperparameters, **given, "n_envs": None}
    if model.env is None or is_fitted(model):
        return
    tuned = present if model.tuned_hyperparameters is None else model.tuned_hyperparameters
    fitted = model.fitted_hyperparameters or present
    by_hand = {name: value for name, value in present.items() if value != fitted.get(name, value)}
    for name, value in by_hand.items():
        if fitted[name] != tuned[name]:
            raise ValueError(
                f"{name} was set by hand to {value!r}, where {tuned[name]!r}, tuned for {model.tuned_for_n_envs} "
                f"environments, had become {fitted[name]!r}: it cannot be rescaled to "
                f"{_n_envs(model)} environments, give load() its value for {model.tuned_for_n_envs}"
            )
    model.tuned_hyperparameters = {**tuned, **by_hand}
    result = _rescale({**attributes, **model.tuned_hyperparameters, **_whole_sequences(model)}, _n_envs(model))
    shares = per_process(result.hyperparameters, place(model.data_parallel).n_processes)
    fitted = {name: shares[name] for name in _FITTED if name in shares}
    attributes.update(fitted)
    n_envs = result.hyperparameters["n_envs"]
    model.fitted_hyperparameters = {**fitted, "n_envs": n_envs, "tuned_for_n_envs": model.tuned_for_n_envs}
    if model.verbose >= 1 and n_envs != model.tuned_for_n_envs:
        print(f"Hyper-parameters tuned for {model.tuned_for_n_envs} environments, for {n_envs}:\n{result.explanation}")


def is_fitted(model: Any) -> bool:
    """
    :param model: one of this package's algorithms
    :return: whether its hyper-parameters are those for the environments of all processes
    """
    if model.tuned_for_n_envs is None:
        return True
    fitted = model.fitted_hyperparameters or {}
    numbers = fitted.get("n_envs"), fitted.get("tuned_for_n_envs")
    return numbers == (_n_envs(model), model.tuned_for_n_envs)


def check_fits(model: Any) -> None:
    """
    :param model: an algorithm about to learn
    :raises ValueError: if it was built for another number of environments or processes than it has
    """
    if is_fitted(model):
        return
    fitted = model.fitted_hyperparameters or {}
    raise ValueError(
        f"the model was built with tuned_for_n_envs={fitted.get('tuned_for_n_envs')} for {fitted.get('n_envs')} "
        f"environments in all processes; now there are tuned_for_n_envs={model.tuned_for_n_envs} and "
        f"{_n_envs(model)} environments: load it or call set_env(), in several processes after "
        "init_process_group()"
    )


def change_env(model: Any, env: GymEnv, force_reset: bool, set_env: Callable[..., None]) -> None:
    """
    Replace the environments, with ``tuned_for_n_envs`` also by another number of them: then policy, averages,
    optimisers and counters go on, and kept rollouts where they have the size of the new ones.

    :param model: one of this package's algorithms
    :param env: the new environment
    :param force_reset: whether to reset it before training, which another number of environments always does
    :param set_env: SB3's method
    :raises ValueError: if the hyper-parameters cannot be rescaled; the model is then as it was
    """
    if is_fitted(model) and (model.tuned_for_n_envs is None or _number_of_envs(env) == model.n_envs):
        set_env(env, force_reset)
        return
    attributes = vars(model)
    before = dict(attributes)
    try:
        model.n_envs = _number_of_envs(env)
        set_env(env, force_reset=True)
        fit_to_envs(model)
        with preserved_generators(model.device):
            fresh = copy.copy(model)
            fresh.seed, fresh.verbose = None, 0
            fresh._setup_model()
        built = {name: each for name, each in vars(fresh).items() if name in _BUILT}
        for name in model._own_buffers:
            kept = before.get(name)
            if kept is not None and built[name] is not None:
                with contextlib.suppress(OtherSizeError):  # of another size: lost, of which learn() warns
                    built[name] = built[name].restored(kept.pieces(), len(kept), built["rollout_buffer"])
    except BaseException:
        attributes.clear()
        attributes.update(before)
        raise
    attributes.update(built)
    model._built_for |= {name: attributes[name] for name in ("n_steps", "n_envs")}


@contextlib.contextmanager
def quietly_about_size() -> Iterator[None]:
    """Within this context, SB3 does not warn of truncated minibatches: it sees rollouts that are not fitted yet."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You have specified a mini-batch size")
        yield


def _n_envs(model: Any) -> int:
    """
    :param model: one of this package's algorithms
    :return: number of environments of all processes that train it
    """
    n_envs: int = model.n_envs * place(model.data_parallel).n_processes
    return n_envs


def _number_of_envs(env: GymEnv | str | None) -> int:
    """
    :param env: environment as SB3's constructors take it
    :return: number of environments that a model of it has
    """
    return env.num_envs if isinstance(env, VecEnv) else 1


def _rescale(settings: Mapping[str, Any], n_envs: int) -> Rescaled:
    """
    :param settings: hyper-parameters as tuned
    :param n_envs: number of environments of all processes
    :return: hyper-parameters for them
    """
    tuned_for = settings["tuned_for_n_envs"]
    check_integer("tuned_for_n_envs", tuned_for, minimum=1)
    return rescale({**settings, "n_envs": tuned_for}, Fraction(n_envs, tuned_for))


def _whole_sequences(model: Any) -> dict[str, Any]:
    """
    :param model: one of this package's algorithms
    :return: ``aux_batch_size`` with which the auxiliary phase of a recurrent policy really trains, if one is given
    """
    tuned = model.tuned_hyperparameters
    size = tuned.get("aux_batch_size")
    if size is None or not model.policy_evaluation.sequence_fields:
        return {}
    length = tuned["n_steps"]
    return {"aux_batch_size": max(1, size // length) * length}
