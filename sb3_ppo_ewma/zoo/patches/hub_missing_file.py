"""
``load_from_hub`` fails for agents without normalisation.

Seen in rl_zoo3 2.9.2 with huggingface_hub 2.4. The zoo takes an ``HTTPError`` of requests for a missing
``vec_normalize.pkl``, but since version 1.0 huggingface_hub does not use requests and raises another error
(https://github.com/huggingface/huggingface_hub/pull/3387). Source: ``download_from_hub`` in
https://github.com/DLR-RM/rl-baselines3-zoo/blob/master/rl_zoo3/load_from_hub.py.
"""

import huggingface_sb3
from huggingface_hub.errors import EntryNotFoundError

from sb3_ppo_ewma.zoo.patches._replace import AnyFunction, replace_function, script_source


def is_needed() -> bool:
    """:return: whether the zoo expects an error of requests that huggingface_hub does not raise"""
    expects_requests = "from requests.exceptions import HTTPError" in script_source("rl_zoo3.load_from_hub")
    return expects_requests and not any(cls.__module__.startswith("requests") for cls in EntryNotFoundError.__mro__)


def apply() -> None:
    """Raise the error that the zoo expects. ``rl_zoo3.load_from_hub`` must be imported after this."""
    replace_function(huggingface_sb3, "load_from_hub", _load_from_hub)


def _load_from_hub(upstream: AnyFunction, repo_id: str, filename: str) -> str:
    try:
        return str(upstream(repo_id, filename))
    except EntryNotFoundError as error:
        if isinstance(error, FileNotFoundError):  # the Hub could not be reached
            raise
        from requests.exceptions import HTTPError

        raise HTTPError(str(error)) from error
