"""
Checkpoints of ``--save-freq`` have no statistics of ``VecNormalize``, the best model loses its own when training ends,
and ``--load-checkpoint`` and ``--load-best`` normalise with those of another step. A killed run leaves half a file.

Seen in rl_zoo3 2.9.2 with Stable-Baselines3 2.9.2. ``ExperimentManager.create_callbacks`` makes a
``CheckpointCallback`` without ``save_vecnormalize``; with it, the callback writes the statistics after the agent. Those
of the best model have the file name of those of the last one. Sources:
https://github.com/DLR-RM/rl-baselines3-zoo/blob/master/rl_zoo3/exp_manager.py and
https://github.com/DLR-RM/stable-baselines3/blob/master/stable_baselines3/common/callbacks.py.
"""

import inspect
import re
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import rl_zoo3.utils
from rl_zoo3 import exp_manager
from rl_zoo3.callbacks import SaveVecNormalizeCallback
from rl_zoo3.exp_manager import ExperimentManager
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import CheckpointCallback

from sb3_ppo_ewma.checkpointing.atomic import replace_atomically
from sb3_ppo_ewma.zoo.patches._replace import AnyFunction, replace_function, upstream_source

# Names of CheckpointCallback
_CHECKPOINT = re.compile(r"(.+)_(\d+)_steps\.zip")
_OF_BEST_MODEL = "best_model_vecnormalize.pkl"
_OF_RUN = "vecnormalize.pkl"  # in a folder of the run's folder
# The agent that a script has looked up last
_agent = Path()


class WholeCheckpointCallback(CheckpointCallback):
    """Writes the statistics, then the agent, each atomically: the statistics of an agent that exists are whole."""

    def _on_step(self) -> bool:
        if self.n_calls % self.save_freq == 0:
            _save_statistics(self.model, Path(self._checkpoint_path("vecnormalize_", "pkl")))
            with replace_atomically(Path(self._checkpoint_path(extension="zip"))) as file:
                self.model.save(file)
        return True


class BestStatisticsCallback(SaveVecNormalizeCallback):
    """Writes the statistics of the best model, for it and for those who look for the run's."""

    def _on_step(self) -> bool:
        run = Path(self.save_path)
        for file in (run.parent / _OF_BEST_MODEL, run / _OF_RUN):
            _save_statistics(self.model, file)
        return True


def _save_statistics(model: BaseAlgorithm, path: Path) -> None:
    statistics = model.get_vec_normalize_env()
    if statistics is not None:
        with replace_atomically(path) as file:
            statistics.save(str(file))


def is_needed() -> bool:
    """:return: whether the zoo asks for checkpoints without statistics"""
    return "save_vecnormalize=" not in upstream_source(ExperimentManager.create_callbacks)


def apply() -> None:
    """Write every agent with statistics, and evaluate it with them."""
    vars(exp_manager).update(
        CheckpointCallback=WholeCheckpointCallback, SaveVecNormalizeCallback=BestStatisticsCallback
    )
    replace_function(rl_zoo3.utils, "get_model_path", _get_model_path)
    replace_function(rl_zoo3.utils, "create_test_env", _create_test_env)
    rl_zoo3.create_test_env = rl_zoo3.utils.create_test_env  # the scripts import it from there


def own_statistics(agent: Path) -> Path | None:
    """
    :param agent: file of an agent
    :return: file of its statistics if it is a checkpoint or the best model, whether or not that file exists; ``None``
        for the agent at the end of a run
    """
    if agent.name == "best_model.zip":
        return agent.with_name(_OF_BEST_MODEL)
    match = _CHECKPOINT.fullmatch(agent.name)
    return agent.with_name(f"{match[1]}_vecnormalize_{match[2]}_steps.pkl") if match else None


def _get_model_path(upstream: AnyFunction, *args: Any, **kwargs: Any) -> Any:
    global _agent
    result = upstream(*args, **kwargs)
    _agent = Path(result[1])
    return result


def _create_test_env(upstream: AnyFunction, env_id: str, *args: Any, **kwargs: Any) -> Any:
    given = inspect.signature(upstream).bind(env_id, *args, **kwargs).arguments
    own_file, folder = own_statistics(_agent), Path(given.get("stats_path") or "")
    is_normalized = (given.get("hyperparams") or {}).get("normalize")
    if own_file is None or not is_normalized or folder.parent != _agent.parent:
        return upstream(**given)
    if not own_file.is_file():
        warnings.warn(
            f"{_agent} has no {own_file.name}: the statistics in {folder} may be of another step", stacklevel=2
        )
        return upstream(**given)
    with tempfile.TemporaryDirectory() as of_agent:  # upstream looks for this name in a folder
        shutil.copyfile(own_file, Path(of_agent, _OF_RUN))
        return upstream(**{**given, "stats_path": of_agent})
