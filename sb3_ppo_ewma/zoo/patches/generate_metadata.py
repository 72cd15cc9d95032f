"""
``rl_zoo3.push_to_hub`` imports ``generate_metadata``, which sb3-team-hf-integration renamed.

Seen in rl_zoo3 2.9.2 with sb3-team-hf-integration 3.2, which is imported as ``huggingface_sb3``. There the function is
``_generate_metadata`` and returns a ``ModelCardData`` instead of a dictionary. Reported in
https://github.com/huggingface/huggingface_sb3/issues/54.
"""

import importlib
from typing import Any

# "import huggingface_sb3.push_to_hub as module" would be the function of that name.
_module: Any = importlib.import_module("huggingface_sb3.push_to_hub")


def is_needed() -> bool:
    """:return: whether the function has only its new name"""
    return not hasattr(_module, "generate_metadata") and hasattr(_module, "_generate_metadata")


def apply() -> None:
    """Give the module a function of the old name that returns a dictionary."""
    _module.generate_metadata = _generate_metadata


def _generate_metadata(model_name: str, env_id: str, mean_reward: float, std_reward: float) -> dict[str, Any]:
    return dict(_module._generate_metadata(model_name, env_id, mean_reward, std_reward).to_dict())
