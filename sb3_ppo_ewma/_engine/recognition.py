"""
Recognise policies that faster code can stand in for. Each function returns the first reason why it cannot, or ``None``.
Anything unknown is a reason: methods overridden in a class or replaced in an instance, modules of other types, hooks.
"""

from collections.abc import Iterable, Set
from typing import Any

import torch as th
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    Distribution,
    MultiCategoricalDistribution,
    StateDependentNoiseDistribution,
)
from stable_baselines3.common.policies import (
    ActorCriticCnnPolicy,
    ActorCriticPolicy,
    MultiInputActorCriticPolicy,
)
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, MlpExtractor, NatureCNN
from torch import nn
from torch.nn.modules import module as torch_module

from sb3_ppo_ewma import policies
from sb3_ppo_ewma.distributions import CLOSED_FORM_DISTRIBUTIONS, GaussianForm, closed_form
from sb3_ppo_ewma.networks import ImpalaCNN, ResidualBlock, SmallGridCNN
from sb3_ppo_ewma.policies import DetachedCriticMlpExtractor, Trunk

# Policies whose code the faster engines know
_POLICIES = (
    *(ActorCriticPolicy, ActorCriticCnnPolicy, MultiInputActorCriticPolicy),
    *(policies.PPGPolicy, policies.PPGCnnPolicy, policies.PPGMultiInputPolicy),
    *(policies.ImpalaPolicy, policies.PPGImpalaPolicy),
)
_BASES = frozenset((*_POLICIES, *policies.PPGPolicy.__mro__))
# What a class derived from them may define: how it is built, and what training does not call
_FREE = {
    *("__init__", "_build", "_build_mlp_extractor", "make_features_extractor", "init_weights", "_initialize_aux_head"),
    *("_get_constructor_parameters", "_dummy_schedule", "save", "load", "train", "set_training_mode"),
    *("predict", "_predict", "predict_values", "obs_to_tensor", "is_vectorized_observation"),
    *("scale_action", "unscale_action", "squash_output", "reset_noise"),
    *("__doc__", "__module__", "__annotations__", "__slots__", "__parameters__", "__orig_bases__", "__qualname__"),
    *("__abstractmethods__", "_abc_impl", "__firstlineno__", "__static_attributes__", "__annotate__"),
    *("__annotate_func__", "__weakref__", "__dict__", "features_extractor_class"),
}
# Distributions that SB3's policies fill; with any other, a policy must override the method that does
FILLED_BY_SB3 = (
    *(DiagGaussianDistribution, StateDependentNoiseDistribution, CategoricalDistribution),
    *(MultiCategoricalDistribution, BernoulliDistribution),
)
_MLP_EXTRACTORS = (MlpExtractor, DetachedCriticMlpExtractor)
_ACTIVATIONS = (nn.ReLU, nn.Tanh, nn.ELU, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Softplus)
_CONTAINERS = (
    *(nn.Sequential, nn.ModuleDict, NatureCNN, CombinedExtractor, FlattenExtractor, MlpExtractor),
    *(ImpalaCNN, ResidualBlock, SmallGridCNN, Trunk, DetachedCriticMlpExtractor),
)
_LAYERS = (nn.Linear, nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, nn.Flatten, nn.Identity, *_ACTIVATIONS)
# Modules that compute each sample by itself, from inputs and parameters alone
KNOWN_MODULES = frozenset((*_CONTAINERS, *_LAYERS))

_MODULE_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
PARAMETER_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_GLOBAL_HOOKS = (
    *("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks"),
)
# Methods of these classes that faster engines rely on, as they were when this module was imported
_RELIED_ON = {
    *("forward", "evaluate_actions", "evaluate_auxiliary", "extract_features", "get_distribution", "forward_actor"),
    *("_get_action_dist_from_latent", "forward_critic", "__call__", "_call_impl", "_wrapped_call_impl", "__getattr__"),
    *("get", "_get_samples", "swap_and_flatten", "to_torch", "_process_sequence", "masked", "_auxiliary_outputs"),
    *("create_sequencers", "pad", "pad_and_flatten"),
}
# Owner, name and what it has of that name, inherited or its own
_ORIGINALS: list[tuple[Any, str, Any]] = []
_METHODS: dict[Any, frozenset[str]] = {}


def rely_on(owners: Iterable[Any]) -> None:
    """
    :param owners: classes and modules whose functions :func:`patched_classes` watches from now on
    """
    for owner in owners:
        defined = set().union(*map(vars, getattr(owner, "__mro__", [owner])))  # not by the class of a class
        names = _RELIED_ON & defined
        if owner in CLOSED_FORM_DISTRIBUTIONS:
            names |= {name for name, function in vars(owner).items() if callable(function)}
        _ORIGINALS.extend((owner, name, getattr(owner, name)) for name in names)


rely_on({*_BASES, *KNOWN_MODULES, *CLOSED_FORM_DISTRIBUTIONS, *DictRolloutBuffer.__mro__, *RolloutBuffer.__mro__})


def methods(cls: Any) -> frozenset[str]:
    """
    :param cls: any class
    :return: names of its methods
    """
    if cls not in _METHODS:
        names = (name for name in dir(cls) if callable(getattr(cls, name, None)))
        _METHODS[cls] = frozenset(names) - {"_compiled_call_impl"}
    return _METHODS[cls]


def replaced_method(instance: Any) -> str | None:
    """
    :param instance: any object
    :return: name of a method that the instance has in place of its class's
    """
    replaced = methods(type(instance)).intersection(vars(instance))
    return min(replaced) if replaced else None


def unknown_policy(policy: Any) -> str | None:
    """
    :param policy: any policy
    :return: why its modules cannot be called as SB3's ``ActorCriticPolicy`` calls them, ``None`` if they can
    """
    cls = type(policy)
    known = next((base for base in cls.__mro__ if base in _POLICIES), None)
    if known is None:
        return f"{cls.__name__} is not derived from ActorCriticPolicy"
    free = _FREE
    if not isinstance(policy.action_dist, FILLED_BY_SB3) and closed_form(policy.action_dist) is not None:
        free = {*_FREE, "_get_action_dist_from_latent"}  # the closed form is declared to compute the same
    overridden = overridden_method(cls, known, _BASES, free)
    if overridden is not None:
        return overridden
    if not (policy._compiled_call_impl is None or hasattr(policy._compiled_call_impl, "stands_in_for_forward")):
        return "the policy is compiled"
    replaced_names = methods(cls).intersection(vars(policy)) - _FREE
    if replaced_names:
        return f"{min(replaced_names)} of the policy was replaced"
    unknown = unknown_extractors(policy)
    if unknown is not None:
        return unknown
    return replaced_in([policy.mlp_extractor]) or hooks([policy.mlp_extractor])


def overridden_method(cls: Any, known: Any, bases: frozenset[Any], free: Set[str] = frozenset(_FREE)) -> str | None:
    """
    :param cls: class of a policy
    :param known: class it is derived from
    :param bases: classes whose methods are known, those of ``known`` among them
    :param free: names of methods that may be overridden
    :return: which method another class overrides, ``None`` if none
    """
    for base in cls.__mro__ if cls is not known else ():
        names = [] if base in bases else [name for name in vars(base) if name not in free]
        overridden = [name for name in names if any(hasattr(other, name) for other in bases.intersection(cls.__mro__))]
        if overridden:
            return f"{base.__name__} overrides {overridden[0]}"
    return None


def unknown_extractors(policy: Any) -> str | None:
    """
    :param policy: any policy
    :return: which of its extractors is not one that SB3's own methods use alike, ``None`` if all are
    """
    if type(policy.mlp_extractor) not in _MLP_EXTRACTORS:
        return f"the mlp_extractor is a {type(policy.mlp_extractor).__name__}"
    own = (policy.pi_features_extractor, policy.vf_features_extractor)
    if policy.share_features_extractor and any(each is not policy.features_extractor for each in own):
        return "features_extractor was replaced without pi_features_extractor and vf_features_extractor"
    return None


def unknown_distribution(policy: Any) -> str | None:
    """
    :param policy: any policy
    :return: why its distribution has no closed form that can be used, ``None`` if it has one
    """
    distribution = policy.action_dist
    form = closed_form(distribution)
    if form is None:
        return f"{type(distribution).__name__} has no closed form"
    if isinstance(form, GaussianForm):
        log_std = getattr(policy, "log_std", None)
        if not isinstance(log_std, th.Tensor) or log_std.shape != (distribution.action_dim,):
            return "log_std is not a tensor with an entry for each action"
    replaced = replaced_method(distribution) if isinstance(distribution, Distribution) else None
    return None if replaced is None else f"{replaced} of the action distribution was replaced"


def replaced_in(modules: Iterable[nn.Module]) -> str | None:
    """
    :param modules: modules
    :return: which method was replaced in one of them
    """
    for module in modules:
        replaced = replaced_method(module)
        if replaced is not None:
            return f"{replaced} of a {type(module).__name__} was replaced"
    return None


def unknown_modules(policy: Any) -> str | None:
    """
    :param policy: any policy
    :return: which module is not known to compute each sample by itself, or has something replaced
    """
    return unknown_module([module for module in policy.modules() if module is not policy])


def unknown_module(modules: list[nn.Module]) -> str | None:
    """
    :param modules: modules
    :return: which of them is not known to compute each sample by itself, or has something replaced
    """
    for module in modules:
        if type(module) not in KNOWN_MODULES:
            return f"{type(module).__name__} is not one of the layers known to compute each sample by itself"
        if module._compiled_call_impl is not None:
            return f"a {type(module).__name__} is compiled"
    return replaced_in(modules)


def unknown_lstm(lstm: nn.LSTM) -> str | None:
    """
    :param lstm: an LSTM
    :return: why it does more than its layers one after the other, ``None`` if it does not
    """
    if type(lstm) is not nn.LSTM:
        return f"the LSTM is a {type(lstm).__name__}"
    if lstm.dropout > 0 and lstm.num_layers > 1:
        return "the LSTM has dropout"
    if lstm.bidirectional or lstm.proj_size or lstm.batch_first:
        return "the LSTM is bidirectional, projected or takes batches first"
    compiled: Any = lstm._compiled_call_impl
    if not (compiled is None or hasattr(compiled, "stands_in_for_forward")):
        return "an LSTM is compiled"
    return replaced_in([lstm])


def hooks(modules: Iterable[nn.Module]) -> str | None:
    """
    :param modules: modules
    :return: which of them, or of their parameters, has a hook
    """
    for module in modules:
        if any(getattr(module, name) for name in _MODULE_HOOKS):
            return f"a {type(module).__name__} has hooks"
        for parameter in module._parameters.values():
            if any(getattr(parameter, name, None) for name in PARAMETER_HOOKS):
                return f"a parameter of a {type(module).__name__} has hooks"
    return "torch has global module hooks" if has_global_hooks() else None


def has_global_hooks() -> bool:
    """
    :return: whether torch has hooks of all modules
    """
    return any(getattr(torch_module, name) for name in _GLOBAL_HOOKS)


def patched_classes() -> str | None:
    """
    :return: which method of the classes that faster engines know was replaced since this module was imported
    """
    for owner, name, function in _ORIGINALS:
        if getattr(owner, name, None) is not function:
            defining = next((base for base in getattr(owner, "__mro__", ()) if name in vars(base)), owner)
            return f"{defining.__name__}.{name} was replaced"
    return None


def has_convolutions(policy: Any) -> bool:
    """
    :param policy: any policy
    :return: whether it computes with images
    """
    return any(type(module) is nn.Conv2d for module in policy.modules())


def takes_channels_last(extractor: nn.Module) -> bool:
    """
    :param extractor: features extractor
    :return: whether it computes the same from images whose channels are last in memory
    """
    modules = list(extractor.modules())
    return all(type(module) in KNOWN_MODULES for module in modules) and (replaced_in(modules) or hooks(modules)) is None
