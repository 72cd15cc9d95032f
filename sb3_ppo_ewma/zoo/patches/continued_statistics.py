"""
``-i`` uses the statistics of ``VecNormalize`` beside the agent and then loses them, or begins new ones without a word.

Seen in rl_zoo3 2.9.2. ``ExperimentManager`` loads ``vecnormalize.pkl`` wherever it finds it, and saves it only if the
entry has ``normalize``: without it, ``enjoy`` shows the new agent observations that are not normalised. A checkpoint
gets the statistics of another step, or none. The entry's settings are ignored; without ``-i`` the file is looked for in
the current folder. Source: ``ExperimentManager._maybe_normalize`` in
https://github.com/DLR-RM/rl-baselines3-zoo/blob/master/rl_zoo3/exp_manager.py.
"""

import copy
import inspect
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

from rl_zoo3.exp_manager import ExperimentManager
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_ppo_ewma.zoo.patches._replace import AnyFunction, replace_function, upstream_source
from sb3_ppo_ewma.zoo.patches.checkpoint_statistics import own_statistics

# Settings that decide what the agent sees
_FIXED = ("norm_obs", "norm_obs_keys")


def is_needed() -> bool:
    """:return: whether upstream looks for one file, whichever agent is continued"""
    return "os.path.dirname(self.trained_agent)" in upstream_source(ExperimentManager._maybe_normalize)


def apply() -> None:
    """Use the statistics that belong to the agent, keep them, and refuse to do without."""
    replace_function(ExperimentManager, "read_hyperparameters", _read_hyperparameters)
    replace_function(ExperimentManager, "_maybe_normalize", _maybe_normalize)


def _statistics(manager: Any) -> Path | None:
    if not manager.trained_agent:
        return None
    agent = Path(manager.trained_agent)
    of_run = agent.parent / manager.env_name / "vecnormalize.pkl"
    files = [file for file in (own_statistics(agent), of_run) if file is not None and file.is_file()]
    return files[0] if files else None


def _read_hyperparameters(upstream: AnyFunction, manager: Any) -> Any:
    both = hyperparams, _ = upstream(manager)
    if not manager.trained_agent:
        return both
    file, agent = _statistics(manager), Path(manager.trained_agent)
    own_file = own_statistics(agent) or agent.parent / manager.env_name / "vecnormalize.pkl"
    if file is None:
        if hyperparams.get("normalize"):
            raise ValueError(
                f"normalize={hyperparams['normalize']!r} needs the statistics of {agent}, and there is no {own_file}: "
                "copy those of the same run there, continue from a file that has them, or, if the agent was trained "
                "without, give -params normalize:False"
            )
        return both
    if "normalize" in hyperparams and not hyperparams["normalize"]:
        raise ValueError(
            f"normalize={hyperparams['normalize']!r} does not fit {agent}, which was trained with the statistics in "
            f"{file}: give -params normalize:True, or move that file away"
        )
    if "normalize" not in hyperparams:
        for each in both:
            each["normalize"] = _setting(file)
        print(f"normalize={_setting(file)}, as in the statistics of the agent, {file}")
    if file != own_file:
        warnings.warn(f"{agent} has no statistics of its own: those in {file} may be of another step", stacklevel=2)
    return both


def _setting(file: Path) -> bool | dict[str, bool]:
    with file.open("rb") as stream:
        statistics = pickle.load(stream)  # by VecNormalize.save, which loads it in the same way
    setting = {name: bool(getattr(statistics, name)) for name in ("norm_obs", "norm_reward")}
    return True if all(setting.values()) else setting


def _maybe_normalize(upstream: AnyFunction, manager: Any, env: VecEnv, eval_env: bool) -> VecEnv:
    file = _statistics(manager)
    if file is None:
        without_agent = copy.copy(manager)
        without_agent.trained_agent = os.path.join(os.devnull, "no agent")
        return upstream(without_agent, env, eval_env)  # type: ignore[no-any-return]
    print(f"Loading the statistics of VecNormalize from {file}")
    normalized = VecNormalize.load(str(file), env)
    for name, value in manager.normalize_kwargs.items():
        if name not in inspect.signature(VecNormalize).parameters:
            raise ValueError(f"normalize: VecNormalize has no argument {name!r}")
        if name not in _FIXED:
            setattr(normalized, name, value)
        elif value is not None and value != getattr(normalized, name):
            given = f"{name}={value!r}"
            raise ValueError(f"normalize: {given} does not fit the agent, trained with {getattr(normalized, name)!r}")
    if eval_env:
        normalized.training = normalized.norm_reward = False
    return normalized
