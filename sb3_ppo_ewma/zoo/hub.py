"""
Our algorithms on the Hugging Face Hub: commands on model cards, names in the list of agents, and an error of ``enjoy``
that helps.

What is repaired in the libraries is in :mod:`sb3_ppo_ewma.zoo.patches`.
"""

import functools
import importlib
import importlib.util
from pathlib import Path
from typing import Any

import huggingface_hub.repocard
import rl_zoo3.utils
from huggingface_sb3 import EnvironmentName, ModelName

from sb3_ppo_ewma.zoo.algorithms import ALGORITHMS, BASELINES
from sb3_ppo_ewma.zoo.patches._replace import AnyFunction, replace_function


@functools.cache  # once
def install_hooks() -> None:
    """Replace functions of the zoo and of huggingface_hub, before the scripts import them."""
    replace_function(huggingface_hub.repocard, "metadata_save", _metadata_save)
    replace_function(rl_zoo3.utils, "get_hf_trained_models", _get_hf_trained_models)
    # That module imports requests, which not every script needs, and load_from_hub, which must be patched already.
    if importlib.util.find_spec("requests") is not None:
        module = importlib.import_module("rl_zoo3.load_from_hub")
        replace_function(module, "download_from_hub", _download_from_hub)


def _metadata_save(upstream: AnyFunction, local_path: Any, data: dict[str, Any]) -> None:
    # The last step of writing a model card. Upstream's commands on it would not find our algorithms.
    card = Path(local_path)
    if card.is_file():
        text = card.read_text(encoding="utf-8")
        text = text.replace("python -m rl_zoo3.", "python -m sb3_ppo_ewma.zoo ")
        card.write_text(text.replace("pip install rl_zoo3", "pip install 'sb3-ppo-ewma[zoo]'"), encoding="utf-8")
    upstream(local_path, data)


def _get_hf_trained_models(upstream: AnyFunction, *args: Any, **kwargs: Any) -> dict[str, tuple[str, str]]:
    # Upstream uses the lower-case name of the class as the name of the algorithm.
    names = {algorithm.__name__.lower(): name for name, algorithm in {**ALGORITHMS, **BASELINES}.items()}
    models = [(names.get(algo, algo), env_id) for algo, env_id in upstream(*args, **kwargs).values()]
    return {ModelName(algo, EnvironmentName(env_id)): (algo, env_id) for algo, env_id in models}


def _download_from_hub(upstream: AnyFunction, algo: str, env_name: EnvironmentName, *args: Any, **kwargs: Any) -> None:
    # enjoy calls it for every agent that is not in its default folder, and train writes to another one.
    try:
        upstream(algo, env_name, *args, **kwargs)
    except Exception as error:
        needs_trust = "TRUST_REMOTE_CODE" in str(error)
        reason = "it needs TRUST_REMOTE_CODE=True in the environment" if needs_trust else str(error)
        raise FileNotFoundError(
            f"no trained {algo} agent for {env_name} in {kwargs.get('folder')}: give its folder with -f (train writes "
            f"to logs). The download from the Hugging Face Hub failed: {reason}"
        ) from error
