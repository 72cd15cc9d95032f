"""
``policy_kwargs: "dict(activation_fn=torch.nn.ReLU)"``, or a class of your own module, is a ``NameError``.

Seen in rl_zoo3 2.9.2. ``_preprocess_hyperparams`` evaluates the text with the names that its own module happens to
have: ``nn.ReLU`` works, what a reader of torch's documentation writes does not. Source:
https://github.com/DLR-RM/rl-baselines3-zoo/blob/master/rl_zoo3/exp_manager.py.
"""

from typing import Any

from rl_zoo3 import exp_manager
from rl_zoo3.exp_manager import ExperimentManager

from sb3_ppo_ewma.zoo.patches._replace import AnyFunction, replace_function, upstream_source
from sb3_ppo_ewma.zoo.python_values import evaluate

# Hyper-parameters that upstream evaluates, and those of policy_kwargs that are classes
_EVALUATED = ("policy_kwargs", "replay_buffer_class", "replay_buffer_kwargs", "monitor_kwargs")
_CLASSES = ("features_extractor_class", "activation_fn", "optimizer_class")


def is_needed() -> bool:
    """:return: whether upstream evaluates the text with nothing but the names of its module"""
    return "= eval(hyperparams[kwargs_key])" in upstream_source(ExperimentManager._preprocess_hyperparams)


def apply() -> None:
    """Import the module in front of a name. A class may also be its name in a mapping of a file."""
    replace_function(ExperimentManager, "_preprocess_hyperparams", _preprocess_hyperparams)


def _preprocess_hyperparams(upstream: AnyFunction, manager: Any, hyperparams: dict[str, Any]) -> Any:
    for name in _EVALUATED:
        text = hyperparams.get(name)
        if isinstance(text, str):
            hyperparams[name] = _evaluated(name, text)
    policy_kwargs = hyperparams.get("policy_kwargs")
    if isinstance(policy_kwargs, dict):
        classes = {key: policy_kwargs[key] for key in _CLASSES if "." in str(policy_kwargs.get(key))}
        named = {key: _evaluated(f"{key} of policy_kwargs", text) for key, text in classes.items() if type(text) is str}
        hyperparams["policy_kwargs"] = {**policy_kwargs, **named}
    return upstream(manager, hyperparams)


def _evaluated(name: str, text: str) -> Any:
    try:
        return evaluate(text, vars(exp_manager))
    except Exception as error:
        raise ValueError(f"{name}: cannot read {text!r}: {error}") from error
