"""
``enjoy``, ``record_video``, ``record_training``, ``benchmark`` and ``push_to_hub`` run code that ``args.yml`` and
``config.yml`` of an agent ask for.

Seen in rl_zoo3 2.9.2. They read these files with ``yaml.UnsafeLoader``, which makes any object, because the zoo writes
ordered dictionaries. Sources: ``get_saved_hyperparams`` in
https://github.com/DLR-RM/rl-baselines3-zoo/blob/master/rl_zoo3/utils.py and
https://github.com/DLR-RM/rl-baselines3-zoo/blob/master/rl_zoo3/enjoy.py.
"""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import yaml

from sb3_ppo_ewma.zoo import restricted_yaml
from sb3_ppo_ewma.zoo.patches._replace import script_source


def is_needed() -> bool:
    """:return: whether the scripts read with the unsafe loader"""
    return any(
        "yaml.UnsafeLoader" in script_source(f"rl_zoo3.{name}")
        for name in ("enjoy", "record_video", "push_to_hub", "utils")
    )


@contextlib.contextmanager
def apply() -> Iterator[None]:
    """Within the context, what the zoo's modules read with the unsafe loader is read with a restricted one."""
    load = yaml.load

    def patched_load(stream: Any, Loader: Any) -> Any:  # noqa: N803  # as in yaml
        frame = inspect.currentframe()
        caller = frame.f_back if frame is not None else None
        is_zoos = caller is not None and caller.f_globals.get("__package__") == "rl_zoo3"
        if Loader is yaml.UnsafeLoader and is_zoos:
            return restricted_yaml.load(stream)
        return load(stream, Loader)

    yaml.load = patched_load
    try:
        yield
    finally:
        yaml.load = load
