"""The state of vectorised environments, in the middle of their episodes."""

from collections.abc import Iterator
from typing import Any

from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize
from stable_baselines3.common.vec_env.base_vec_env import VecEnvWrapper

from sb3_ppo_ewma.checkpointing.object_states import restore_state, state_of
from sb3_ppo_ewma.checkpointing.plain_data import NotPlainError, dumps
from sb3_ppo_ewma.checkpointing.simulator_states import UnknownStateError

_METHOD = "checkpoint_state"


def environments_state(env: VecEnv, in_another_process: bool) -> dict[str, Any]:
    """
    :param env: environments
    :param in_another_process: whether they were copied into another process that steps them
    :return: their state as plain data. Where it cannot be read, ``"reason"`` says why, and ``"statistics"`` are those
        of ``VecNormalize``
    """
    state: dict[str, Any] = {
        "layers": [type(layer).__name__ for layer in _layers(env)],
        "n_envs": env.num_envs,
        "statistics": [state_of(each) for each in _statistics(env)],
        "reason": "",
    }
    if in_another_process:
        return {**state, "reason": "another process collects in them (max_policy_lag)"}
    try:
        state |= _complete_state(env)
        dumps(state)
    except (UnknownStateError, NotPlainError) as error:
        state = {**state, "whole": None, "each": None, "reason": str(error)}
    return state


def _complete_state(env: VecEnv) -> dict[str, Any]:
    base = env.unwrapped
    if isinstance(base, DummyVecEnv) or not _has_processes(base):
        return {"whole": state_of(env), "each": None}
    if not base.has_attr(_METHOD):
        raise UnknownStateError(f"the environments of {type(base).__name__} are not wrapped with EnvStateWrapper")
    answers = base.env_method(_METHOD)
    for index, (data, reason) in enumerate(answers):
        if data is None:
            raise UnknownStateError(f"environment {index}: {reason}")
    return {"whole": state_of(env, without=base), "each": [data for data, _ in answers]}


def restore_environments(env: VecEnv, state: dict[str, Any], seed: int) -> tuple[Any, str]:
    """
    :param env: environments like those that the state was read from
    :param state: from :func:`environments_state`
    :param seed: for episodes that begin anew
    :return: first observations of episodes that began anew, ``None`` if the old ones go on; why they began anew
    :raises ValueError: if the wrappers are others
    """
    layers = [type(layer).__name__ for layer in _layers(env)]
    if layers[:-1] != state["layers"][:-1]:
        raise ValueError(
            f"env must be wrapped as it was when the checkpoint was written: {state['layers']}, got {layers}"
        )
    env.seed(seed)
    env.reset()  # after which there is all that episodes create
    reason = state["reason"]
    if not reason and (layers, env.num_envs) != (state["layers"], state["n_envs"]):
        reason = f"they were {state['n_envs']} of {state['layers'][-1]}, now {env.num_envs} of {layers[-1]}"
    if not reason:
        reason = _restore(env, state)
    if not reason:
        return None, ""
    for moments, saved in zip(_statistics(env), state["statistics"], strict=True):
        restore_state(moments, saved)
    env.seed(seed)
    return env.reset(), reason


def _restore(env: VecEnv, state: dict[str, Any]) -> str:
    base = env.unwrapped
    try:
        if state["each"] is None:
            restore_state(env, state["whole"])
            return ""
        if not base.has_attr(_METHOD):
            return f"the environments of {type(base).__name__} are not wrapped with EnvStateWrapper"
        for index, data in enumerate(state["each"]):
            [reason] = base.env_method(f"restore_{_METHOD}", data, indices=[index])
            if reason:
                return f"environment {index}: {reason}"
        restore_state(env, state["whole"], without=base)
    except UnknownStateError as error:
        return str(error)
    return ""


def _layers(env: VecEnv) -> Iterator[VecEnv]:
    layer: VecEnv = env
    while isinstance(layer, VecEnvWrapper):
        yield layer
        layer = layer.venv
    yield layer


def _has_processes(base: VecEnv) -> bool:
    return hasattr(base, "processes") or hasattr(base, "worker_process")


def _statistics(env: VecEnv) -> list[Any]:
    """
    :param env: environments
    :return: the moments of each ``VecNormalize``, of observations and of returns
    """
    layers = [layer for layer in _layers(env) if isinstance(layer, VecNormalize)]
    found = [vars(layer)[name] for layer in layers for name in ("obs_rms", "ret_rms") if name in vars(layer)]
    return [each for moments in found for each in (moments.values() if isinstance(moments, dict) else [moments])]
