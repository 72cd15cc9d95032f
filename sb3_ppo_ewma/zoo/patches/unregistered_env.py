"""
``enjoy`` and ``record_video`` fail with a bare ``KeyError`` if nothing registers the agent's environment.

Seen in rl_zoo3 2.9.2. ``ExperimentManager.entry_point`` looks the name up without a check; only ``train`` checks it
first. Reported in https://github.com/DLR-RM/rl-baselines3-zoo/issues/428.
"""

from rl_zoo3.exp_manager import ExperimentManager

from sb3_ppo_ewma.zoo.patches._replace import AnyFunction, replace_function


def is_needed() -> bool:
    """:return: whether an unknown name raises a ``KeyError``"""
    try:
        ExperimentManager.entry_point("sb3_ppo_ewma/NotRegistered-v0")
    except KeyError:
        return True
    except Exception:
        return False
    return False


def apply() -> None:
    """Raise a ``ValueError`` with the sentence that ``train`` has for it."""
    replace_function(ExperimentManager, "entry_point", _entry_point)


def _entry_point(upstream: AnyFunction, env_id: str) -> str:
    try:
        return str(upstream(env_id))
    except KeyError:
        raise ValueError(f"{env_id} not found in gym registry.") from None
