"""
A wrong ``--storage``, ``--study-name`` or ``--trial-id`` is not refused by name.

Seen in rl_zoo3 2.9.2. A ``.log`` file that does not exist is created; a study or trial that does not exist raises a
bare ``KeyError`` or ``IndexError``, and so does a trial of another algorithm. Source: ``ExperimentManager.load_trial``
in https://github.com/DLR-RM/rl-baselines3-zoo/blob/master/rl_zoo3/exp_manager.py.
"""

from pathlib import Path
from typing import Any

from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER

from sb3_ppo_ewma.zoo.patches._replace import AnyFunction, replace_function, upstream_source


def is_needed() -> bool:
    """:return: whether upstream handles no error of the look-up"""
    return "except" not in upstream_source(ExperimentManager.load_trial)


def apply() -> None:
    """Raise a ``FileNotFoundError`` or ``ValueError`` that names what is missing."""
    replace_function(ExperimentManager, "load_trial", _load_trial)


def _load_trial(
    upstream: AnyFunction,
    manager: Any,
    storage: str,
    study_name: str,
    trial_id: int | None = None,
    convert: bool = True,
) -> dict[str, Any]:
    if storage.endswith(".log") and not Path(storage).is_file():
        raise FileNotFoundError(f"--storage {storage} does not exist")  # Optuna would create it
    try:
        params: dict[str, Any] = upstream(manager, storage, study_name, trial_id, convert=False)
    except KeyError:
        raise ValueError(f"{storage} has no study {study_name}") from None
    except IndexError:
        raise ValueError(f"study {study_name} has no trial {trial_id}") from None
    try:
        return HYPERPARAMS_CONVERTER[manager.algo](params) if convert else params
    except KeyError as error:
        raise ValueError(
            f"trial {trial_id} of study {study_name} has no {error}: "
            f"it belongs to another algorithm than {manager.algo}, or never started"
        ) from None
