"""Mends of what the zoo's scripts need of the Hugging Face Hub and its libraries."""

import functools
import importlib
import importlib.util
from pathlib import Path
from typing import Any

import huggingface_hub.repocard
import huggingface_sb3
import rl_zoo3.utils
from huggingface_hub.errors import EntryNotFoundError
from huggingface_sb3 import EnvironmentName, ModelName

from sb3_ppo_ewma.zoo.algorithms import ALGORITHMS
from sb3_ppo_ewma.zoo.mending import Function, replace


@functools.cache  # once
def mend() -> None:
    """Apply the mends, before the scripts import what they change."""
    _restore_generate_metadata()
    replace(huggingface_hub.repocard, "metadata_save", _metadata_save)
    replace(rl_zoo3.utils, "get_hf_trained_models", _get_hf_trained_models)
    replace(huggingface_sb3, "load_from_hub", _load_from_hub)
    # Imports requests, which not every script needs: after load_from_hub, which it imports too.
    if importlib.util.find_spec("requests") is not None:
        replace(importlib.import_module("rl_zoo3.load_from_hub"), "download_from_hub", _download_from_hub)


def _restore_generate_metadata() -> None:
    # push_to_hub imports it; sb3-team-hf-integration 3.2 has it under another name, with another type of result.
    module: Any = importlib.import_module("huggingface_sb3.push_to_hub")
    if hasattr(module, "generate_metadata") or not hasattr(module, "_generate_metadata"):
        return

    def generate_metadata(model_name: str, env_id: str, mean_reward: float, std_reward: float) -> dict[str, Any]:
        return dict(module._generate_metadata(model_name, env_id, mean_reward, std_reward).to_dict())

    module.generate_metadata = generate_metadata


def _metadata_save(upstream: Function, local_path: Any, data: dict[str, Any]) -> None:
    # The last step of writing a model card, whose commands do not know our algorithms.
    card = Path(local_path)
    if card.is_file():
        text = card.read_text(encoding="utf-8")
        text = text.replace("python -m rl_zoo3.", "python -m sb3_ppo_ewma.zoo ")
        card.write_text(text.replace("pip install rl_zoo3", "pip install 'sb3-ppo-ewma[zoo]'"), encoding="utf-8")
    upstream(local_path, data)


def _get_hf_trained_models(upstream: Function, *args: Any, **kwargs: Any) -> dict[str, tuple[str, str]]:
    # Upstream takes the class name in lower case for the name of the algorithm.
    names = {algorithm.__name__.lower(): name for name, algorithm in ALGORITHMS.items()}
    models = [(names.get(algo, algo), env_id) for algo, env_id in upstream(*args, **kwargs).values()]
    return {ModelName(algo, EnvironmentName(env_id)): (algo, env_id) for algo, env_id in models}


def _load_from_hub(upstream: Function, repo_id: str, filename: str) -> str:
    try:
        return str(upstream(repo_id, filename))
    except EntryNotFoundError as error:
        if isinstance(error, FileNotFoundError):  # not reached, rather than not there
            raise
        # Upstream expects the error of requests, which huggingface_hub used before 1.0, for a file that may be missing.
        from requests.exceptions import HTTPError

        raise HTTPError(str(error)) from error


def _download_from_hub(upstream: Function, algo: str, env_name: EnvironmentName, *args: Any, **kwargs: Any) -> None:
    # enjoy calls it for every agent that is not in its default folder, which is not the one that train writes to.
    try:
        upstream(algo, env_name, *args, **kwargs)
    except Exception as error:
        needs_trust = "TRUST_REMOTE_CODE" in str(error)
        reason = "it needs TRUST_REMOTE_CODE=True in the environment" if needs_trust else str(error)
        raise FileNotFoundError(
            f"no trained {algo} agent for {env_name} in {kwargs.get('folder')}: give its folder with -f (train writes "
            f"to logs). The download from the Hugging Face Hub failed: {reason}"
        ) from error
