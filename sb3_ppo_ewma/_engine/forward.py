"""
Forward passes of SB3's own actor-critic policies without its distribution objects, whose construction costs more than
the arithmetic. The results are those of the policy's methods up to rounding, from the same random numbers.

A policy that overrides one of the methods concerned, has another distribution or was compiled is called as it is.
"""

import math
from collections.abc import Callable
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    MultiCategoricalDistribution,
)
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.type_aliases import PyTorchObs
from torch.nn import functional as F

from sb3_ppo_ewma import losses
from sb3_ppo_ewma.distributions import SoftplusDiagGaussianDistribution

_METHODS = ("forward", "evaluate_actions", "extract_features", "get_distribution", "_get_action_dist_from_latent")
_GAUSSIANS = (DiagGaussianDistribution, SoftplusDiagGaussianDistribution)
_DISTRIBUTIONS = (*_GAUSSIANS, CategoricalDistribution, MultiCategoricalDistribution, BernoulliDistribution)

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PARAMETER_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")

_LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)


def is_standard(policy: Any) -> bool:
    """
    :param policy: any policy
    :return: whether :class:`StandardPolicy` may take the place of its methods
    """
    return (
        all(getattr(type(policy), name, None) is getattr(ActorCriticPolicy, name) for name in _METHODS)
        and not any(name in vars(policy) for name in _METHODS)
        and type(policy.action_dist) in _DISTRIBUTIONS
        and policy._compiled_call_impl is None
    )


def has_hooks(policy: Any) -> bool:
    """
    :param policy: any policy
    :return: whether a module or a parameter has a hook, which sees what passes through it
    """
    modules = [policy]
    for module in modules:  # Module.modules() and .parameters() take several times as long
        modules += [child for child in module._modules.values() if child is not None]
        if any(getattr(module, hooks) for hooks in _HOOKS) or any(
            getattr(parameter, hooks, None) for parameter in module._parameters.values() for hooks in _PARAMETER_HOOKS
        ):
            return True
    return False


class StandardPolicy:
    """
    The methods of a policy that collection and training call.

    :param policy: for which :func:`is_standard` holds
    """

    def __init__(self, policy: Any) -> None:
        self.policy = policy
        space = policy.observation_space
        # Made once: SB3 compares the bounds of all pixels at every call.
        self._preprocess = {
            key: preprocessing(part, policy.normalize_images)
            for key, part in (space.spaces if isinstance(space, spaces.Dict) else {"": space}).items()
        }

    def outputs(self, obs: PyTorchObs) -> tuple[th.Tensor, th.Tensor]:
        """
        :param obs: observations
        :return: outputs of ``policy.action_net`` and of ``policy.value_net``
        """
        latent_pi, latent_vf = self._latents(obs)
        return self.policy.action_net(latent_pi), self.policy.value_net(latent_vf)

    def action_outputs(self, obs: PyTorchObs) -> th.Tensor:
        """
        :param obs: observations
        :return: outputs of ``policy.action_net``, without the critic
        """
        policy = self.policy
        features = policy.pi_features_extractor(self._preprocessed(obs))
        outputs: th.Tensor = policy.action_net(policy.mlp_extractor.forward_actor(features))
        return outputs

    def evaluate_actions(self, obs: PyTorchObs, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        ``policy.evaluate_actions``.

        :param obs: observations
        :param actions: their actions, see :func:`as_distributed`
        :return: values (batch, 1), log-probabilities and entropies of the actions, both (batch,)
        """
        outputs, values = self.outputs(obs)
        parameters = distribution(self.policy, outputs)
        return values, log_prob(self.policy, parameters, actions), entropy(self.policy, parameters)

    def log_prob(self, obs: PyTorchObs, actions: th.Tensor) -> th.Tensor:
        """
        :param obs: observations
        :param actions: their actions, see :func:`as_distributed`
        :return: (batch,)
        """
        return log_prob(self.policy, distribution(self.policy, self.action_outputs(obs)), actions)

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        ``policy.forward``.

        :param obs: observations
        :param deterministic: take the most likely actions
        :return: actions (batch, ...), values (batch, 1), log-probabilities (batch,)
        """
        outputs, values = self.outputs(obs)
        parameters = distribution(self.policy, outputs)
        actions = (_mode if deterministic else _sample)(self.policy.action_dist, parameters)
        shaped = actions.reshape((-1, *self.policy.action_space.shape))
        return shaped, values, log_prob(self.policy, parameters, actions)

    def evaluate_auxiliary(self, obs: PyTorchObs) -> tuple[list[th.Tensor], th.Tensor, th.Tensor]:
        """
        ``policy.evaluate_auxiliary`` of a :class:`~sb3_ppo_ewma.PPGPolicy`.

        :param obs: observations
        :return: parameters for :func:`kl_divergence`; values V and auxiliary values V_aux, both (batch,)
        """
        policy = self.policy
        latent_pi, latent_vf = self._latents(obs)
        values, aux_values = policy.value_net(latent_vf), policy.aux_value_net(latent_pi)
        return distribution(policy, policy.action_net(latent_pi)), values.flatten(), aux_values.flatten()

    def _latents(self, obs: PyTorchObs) -> tuple[th.Tensor, th.Tensor]:
        policy = self.policy
        preprocessed = self._preprocessed(obs)
        if policy.share_features_extractor:
            latent_pi, latent_vf = policy.mlp_extractor(policy.features_extractor(preprocessed))
            return latent_pi, latent_vf
        pi_features = policy.pi_features_extractor(preprocessed)
        vf_features = policy.vf_features_extractor(preprocessed)
        return policy.mlp_extractor.forward_actor(pi_features), policy.mlp_extractor.forward_critic(vf_features)

    def _preprocessed(self, obs: PyTorchObs) -> PyTorchObs:
        if isinstance(obs, dict):
            return {key: self._preprocess[key](part) for key, part in obs.items()}
        return self._preprocess[""](obs)


def preprocessing(space: spaces.Space[Any], normalize_images: bool) -> Callable[[th.Tensor], th.Tensor]:
    """
    :param space: of observations, not a ``Dict``
    :param normalize_images: divide images by 255
    :return: what SB3's ``preprocess_obs`` does with such observations
    """
    if isinstance(space, spaces.Discrete):
        n = int(space.n)
        return lambda obs: F.one_hot(obs.long(), num_classes=n).float()
    if isinstance(space, spaces.MultiDiscrete):
        sizes = [int(size) for size in space.nvec.flatten()]

        def one_hots(obs: th.Tensor) -> th.Tensor:
            columns = obs.long().flatten(start_dim=1).unbind(dim=1)
            return th.cat([F.one_hot(column, size) for column, size in zip(columns, sizes, strict=True)], dim=1).float()

        return one_hots
    if not (isinstance(space, spaces.Box) and is_image_space(space)):
        return lambda obs: obs.float()
    memory_format = th.channels_last if space.shape[0] == min(space.shape) else th.contiguous_format
    if normalize_images:
        return lambda obs: _images(obs, memory_format) / 255.0
    return lambda obs: _images(obs, memory_format)


def _images(obs: th.Tensor, memory_format: th.memory_format) -> th.Tensor:
    """
    :param obs: (batch, three axes)
    :param memory_format: that is the fastest for convolutions on a CPU
    :return: in single precision
    """
    return obs.to(dtype=th.float32, memory_format=memory_format if obs.device.type == "cpu" else th.preserve_format)


def kl_divergence(policy: Any, old: list[th.Tensor], new: list[th.Tensor]) -> th.Tensor:
    """
    :param policy: whose distributions they are
    :param old: parameters of π_old
    :param new: parameters of π_θ, with gradient
    :return: (batch,) KL(π_old ‖ π_θ), summed over action dimensions
    """
    if isinstance(policy.action_dist, DiagGaussianDistribution):
        (old_mean, old_std), (mean, std) = old, new
        ratio = old_std / std
        return (0.5 * (ratio**2 + ((old_mean - mean) / std) ** 2 - 1) - ratio.log()).sum(dim=1)
    if isinstance(policy.action_dist, BernoulliDistribution):
        return losses.bernoulli_kl(old[0], new[0]).sum(dim=1)
    return th.stack([losses.categorical_kl(p.exp(), p, q) for p, q in zip(old, new, strict=True)]).sum(dim=0)


def as_distributed(action_space: spaces.Space[Any], actions: th.Tensor) -> th.Tensor:
    """
    :param action_space: of the environment
    :param actions: as the rollout buffer stores them
    :return: in the form that the policy's distribution expects
    """
    return actions.long().flatten() if isinstance(action_space, spaces.Discrete) else actions


def distribution(policy: Any, outputs: th.Tensor, log_std: th.Tensor | None = None) -> list[th.Tensor]:
    """
    :param policy: for which :func:`is_standard` holds
    :param outputs: of its ``action_net``
    :param log_std: in place of its own
    :return: parameters of the actions' distribution: mean (batch, n) and standard deviation (n,) of a Gaussian;
        log-probabilities (batch, n) of one or several categorical distributions; logits (batch, n) of binary actions
    """
    kind = type(policy.action_dist)
    if kind is CategoricalDistribution:
        return [F.log_softmax(outputs, dim=-1)]
    if kind is MultiCategoricalDistribution:
        logits = th.split(outputs, list(policy.action_dist.action_dims), dim=1)
        return [F.log_softmax(part, dim=-1) for part in logits]
    if kind is DiagGaussianDistribution:
        return [outputs, (policy.log_std if log_std is None else log_std).exp()]
    if kind is SoftplusDiagGaussianDistribution:
        return [outputs, F.softplus(policy.log_std if log_std is None else log_std)]
    return [outputs]


def log_prob(policy: Any, parameters: list[th.Tensor], actions: th.Tensor) -> th.Tensor:
    """
    :param policy: for which :func:`is_standard` holds
    :param parameters: from :func:`distribution`, of Gaussian and categorical actions also (n, batch, ...)
    :param actions: see :func:`as_distributed`
    :return: (batch,), or (n, batch)
    """
    kind = policy.action_dist
    if isinstance(kind, DiagGaussianDistribution):
        mean, std = parameters
        return -(0.5 * ((actions - mean) / std) ** 2).sum(-1) - (std.log() + _LOG_SQRT_2PI).sum(-1)
    if isinstance(kind, CategoricalDistribution):
        return _chosen(parameters[0], actions)
    if isinstance(kind, MultiCategoricalDistribution):
        chosen = [_chosen(part, a) for part, a in zip(parameters, actions.unbind(dim=1), strict=True)]
        return th.stack(chosen).sum(dim=0)
    return -F.binary_cross_entropy_with_logits(parameters[0], actions, reduction="none").sum(dim=1)


def entropy(policy: Any, parameters: list[th.Tensor]) -> th.Tensor:
    """
    :param policy: for which :func:`is_standard` holds
    :param parameters: from :func:`distribution`, also of several minibatches of one size, (n, ...) each
    :return: (batch,), or (n, batch)
    """
    kind = policy.action_dist
    if isinstance(kind, DiagGaussianDistribution):
        mean, std = parameters
        return (0.5 + _LOG_SQRT_2PI + std.log()).sum(-1).expand(mean.shape[:-1])
    if isinstance(kind, CategoricalDistribution):
        return _categorical_entropy(parameters[0])
    if isinstance(kind, MultiCategoricalDistribution):
        return th.stack([_categorical_entropy(part) for part in parameters]).sum(dim=0)
    (logits,) = parameters
    return F.binary_cross_entropy_with_logits(logits, th.sigmoid(logits), reduction="none").sum(dim=1)


def _chosen(log_probs: th.Tensor, actions: th.Tensor) -> th.Tensor:
    actions = actions.long()
    if actions.dim() < log_probs.dim() - 1:
        actions = actions.expand(log_probs.shape[:-1])
    return log_probs.gather(-1, actions.unsqueeze(-1)).squeeze(-1)


def _categorical_entropy(log_probs: th.Tensor) -> th.Tensor:
    # Where a probability is 0, its logarithm may be -Inf.
    finite = th.clamp(log_probs, min=th.finfo(log_probs.dtype).min)
    return -(finite * log_probs.exp()).sum(dim=-1)


def _sample(action_dist: Any, parameters: list[th.Tensor]) -> th.Tensor:
    if isinstance(action_dist, DiagGaussianDistribution):
        mean, std = parameters
        return mean + th.empty_like(mean).normal_() * std
    if isinstance(action_dist, CategoricalDistribution):
        return _drawn(parameters[0])
    if isinstance(action_dist, MultiCategoricalDistribution):
        return th.stack([_drawn(part) for part in parameters], dim=1)
    return th.bernoulli(th.sigmoid(parameters[0]))


def _drawn(log_probs: th.Tensor) -> th.Tensor:
    # What multinomial does, without its checks: a NaN shows in the log-probabilities.
    probs = log_probs.exp()
    return (probs / th.empty_like(probs).exponential_()).argmax(dim=-1)


def _mode(action_dist: Any, parameters: list[th.Tensor]) -> th.Tensor:
    if isinstance(action_dist, DiagGaussianDistribution):
        return parameters[0]
    if isinstance(action_dist, CategoricalDistribution):
        return th.argmax(parameters[0], dim=1)
    if isinstance(action_dist, MultiCategoricalDistribution):
        return th.stack([th.argmax(part, dim=1) for part in parameters], dim=1)
    return th.round(th.sigmoid(parameters[0]))
