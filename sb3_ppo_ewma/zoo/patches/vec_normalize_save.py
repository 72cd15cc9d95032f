"""
A process that is killed while it saves the statistics of ``VecNormalize`` leaves half a file in the place of the last
ones, without which the saved agent is worthless. The zoo saves them with every new best agent and at the end.

Seen in Stable-Baselines3 2.9.2. ``VecNormalize.save`` empties the file and then writes it. Source:
https://github.com/DLR-RM/stable-baselines3/blob/master/stable_baselines3/common/vec_env/vec_normalize.py.
"""

from pathlib import Path
from typing import Any

from stable_baselines3.common.vec_env import VecNormalize

from sb3_ppo_ewma.checkpointing.atomic import replace_atomically
from sb3_ppo_ewma.zoo.patches._replace import AnyFunction, replace_function, upstream_source


def is_needed() -> bool:
    """:return: whether upstream writes to the file itself"""
    source = upstream_source(VecNormalize.save)
    return 'open(save_path, "wb")' in source and "replace" not in source


def apply() -> None:
    """Replace the file by a whole one."""
    replace_function(VecNormalize, "save", _save)


def _save(upstream: AnyFunction, venv: Any, save_path: Any) -> None:
    with replace_atomically(Path(save_path)) as temporary:
        upstream(venv, str(temporary))
