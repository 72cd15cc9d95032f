"""
What a trained agent remembers beside what the zoo reads: the packages that register its environment. And what it is,
which an algorithm that cannot load it should say.
"""

import functools
import importlib
import json
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import rl_zoo3.utils
from rl_zoo3.exp_manager import ExperimentManager

from sb3_ppo_ewma.zoo import restricted_yaml
from sb3_ppo_ewma.zoo.algorithms import ALGORITHMS
from sb3_ppo_ewma.zoo.command_line import explain
from sb3_ppo_ewma.zoo.patches._replace import AnyFunction, replace_function


@functools.cache  # once
def install_hooks() -> None:
    """Replace functions of the zoo that look for an agent and load it."""
    replace_function(rl_zoo3.utils, "get_model_path", _get_model_path)
    replace_function(ExperimentManager, "_load_pretrained_agent", _load_pretrained_agent)


def saved_arguments(log_path: str, env_name: str) -> dict[str, Any]:
    """
    :param log_path: folder of a run
    :param env_name: name of its environment, as in file names
    :return: arguments of the command that trained it; empty if they were not saved
    """
    file = Path(log_path, env_name, "args.yml")
    if not file.is_file():
        return {}
    with file.open() as opened:
        return dict(restricted_yaml.load(opened) or {})


def import_gym_packages(modules: Iterable[str], origin: str = "--gym-packages") -> None:
    """
    :param modules: names of modules that register environments
    :param origin: what named them, for the message
    :raises ImportError: if one cannot be imported
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise ImportError(f"{origin} {module}: {explain(error)}") from error


def _get_model_path(upstream: AnyFunction, exp_id: int, folder: str, algo: str, env_name: Any, *args: Any) -> Any:
    result = upstream(exp_id, folder, algo, env_name, *args)
    import_gym_packages(saved_arguments(result[2], env_name).get("gym_packages") or (), "trained with --gym-packages")
    return result


def _load_pretrained_agent(upstream: AnyFunction, manager: Any, *args: Any) -> Any:
    try:
        return upstream(manager, *args)
    except Exception as error:
        if manager.algo in ALGORITHMS or not _is_ours(manager.trained_agent):
            raise
        raise ValueError(
            f"{manager.trained_agent} is an agent of PPO-EWMA or PPG, which {manager.algo} cannot load ({error}): name "
            "its own --algo, or convert it in Python with its method to_ppo() and save the result"
        ) from error


def _is_ours(agent: str) -> bool:
    with zipfile.ZipFile(agent) as archive:
        return "prox_decay" in json.loads(archive.read("data"))
