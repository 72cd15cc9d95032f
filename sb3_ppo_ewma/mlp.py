"""
The dense networks of SB3's ``MlpPolicy`` as matrix products with a backward pass of their own. For networks this small,
modules and the recording of a graph cost more than the arithmetic.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch as th
from stable_baselines3.common.distributions import CategoricalDistribution, DiagGaussianDistribution
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, MlpExtractor
from torch import nn
from torch.nn import functional as F

from sb3_ppo_ewma import forward
from sb3_ppo_ewma.policies import DetachedCriticMlpExtractor

_MLP_EXTRACTORS = (MlpExtractor, DetachedCriticMlpExtractor)
_EXTRACTORS = (FlattenExtractor, CombinedExtractor)
_DISTRIBUTIONS = (CategoricalDistribution, DiagGaussianDistribution)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PARAMETER_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


class Activation(NamedTuple):
    """
    An activation function and its derivative.

    :param forward: from inputs to outputs
    :param backward: from the derivative with respect to the outputs, and these, to that with respect to the inputs
    """

    forward: Callable[[th.Tensor], th.Tensor]
    backward: Callable[[th.Tensor, th.Tensor], th.Tensor]


def _relu_backward(gradient: th.Tensor, outputs: th.Tensor) -> th.Tensor:
    result: th.Tensor = th.ops.aten.threshold_backward(gradient, outputs, 0)
    return result


ACTIVATIONS: dict[type[nn.Module], Activation] = {
    nn.Tanh: Activation(th.tanh, th.ops.aten.tanh_backward.default),
    nn.ReLU: Activation(th.relu, _relu_backward),
}


class Mlp:
    """
    A chain of fully-connected layers.

    :param layers: the linear layers
    :param activations: between them, one fewer
    """

    def __init__(self, layers: list[nn.Linear], activations: list[Activation]) -> None:
        self._parameters = [(layer.weight, layer.bias) for layer in layers]
        self._activations = activations

    def forward(self, inputs: th.Tensor) -> list[th.Tensor]:
        """
        :param inputs: (batch, n)
        :return: inputs of all layers and, last, the outputs
        """
        values = [inputs]
        for (weight, bias), activation in zip(self._parameters, self._activations, strict=False):
            values.append(activation.forward(F.linear(values[-1], weight, bias)))
        values.append(F.linear(values[-1], *self._parameters[-1]))
        return values

    def backward(self, values: list[th.Tensor], gradient: th.Tensor) -> None:
        """
        Put the derivatives with respect to the parameters into their ``grad``.

        :param values: from :meth:`forward`
        :param gradient: derivative with respect to the outputs
        """
        for index in range(len(self._parameters) - 1, -1, -1):
            weight, bias = self._parameters[index]
            weight.grad = gradient.t() @ values[index]
            bias.grad = gradient.sum(0)
            if index > 0:
                gradient = self._activations[index - 1].backward(gradient @ weight, values[index])


class MlpPolicy(forward.StandardPolicy):
    """
    Actor and critic of a policy whose networks are separate chains of dense layers behind a features extractor without
    parameters.

    :param policy: for which :func:`is_mlp_policy` holds
    """

    def __init__(self, policy: Any) -> None:
        super().__init__(policy)
        actor, critic = _chains(policy)
        self.actor, self.critic = _as_mlp(actor), _as_mlp(critic)
        # Whether the backward pass computes all that autograd would
        self.is_trained = all(parameter.requires_grad for parameter in _parameters(policy))

    def features(self, obs: Any) -> th.Tensor:
        """
        :param obs: observations
        :return: (batch, features_dim)
        """
        preprocessed = self._preprocessed(obs)
        if isinstance(preprocessed, th.Tensor):
            return preprocessed.flatten(start_dim=1)  # what FlattenExtractor does
        features: th.Tensor = self.policy.pi_features_extractor(preprocessed)
        return features

    def outputs(self, obs: Any) -> tuple[th.Tensor, th.Tensor]:
        """
        :param obs: observations
        :return: outputs of ``policy.action_net`` and of ``policy.value_net``
        """
        features = self.features(obs)
        return self.actor.forward(features)[-1], self.critic.forward(features)[-1]

    def action_outputs(self, obs: Any) -> th.Tensor:
        """
        :param obs: observations
        :return: outputs of ``policy.action_net``
        """
        return self.actor.forward(self.features(obs))[-1]

    def actor_backward(
        self,
        values: list[th.Tensor],
        parameters: list[th.Tensor],
        actions: th.Tensor,
        log_prob_gradient: th.Tensor,
        entropy_gradient: float | None,
        entropy: th.Tensor,
    ) -> None:
        """
        Put the derivatives with respect to the actor's parameters into their ``grad``.

        :param values: from ``self.actor.forward``
        :param parameters: of the distribution, see :func:`~sb3_ppo_ewma.forward.distribution`
        :param actions: (batch, ...)
        :param log_prob_gradient: (batch,) derivative with respect to their log-probabilities
        :param entropy_gradient: derivative with respect to the entropy of each sample, ``None`` for 0
        :param entropy: (batch,)
        """
        weights = log_prob_gradient.unsqueeze(1)
        if isinstance(self.policy.action_dist, CategoricalDistribution):
            (log_probs,) = parameters
            probs = log_probs.exp()
            # d log p(a) / d logits = onehot(a) − p
            gradient = (-weights * probs).scatter_add_(1, actions.unsqueeze(1), weights)
            if entropy_gradient is not None:
                # dH / d logits = −p·(log p + H)
                gradient -= entropy_gradient * probs * (log_probs + entropy.unsqueeze(1))
        else:
            mean, std = parameters
            deviations = (actions - mean) / std
            gradient = weights * deviations / std
            log_std_gradient = (weights * (deviations**2 - 1)).sum(0)
            if entropy_gradient is not None:
                log_std_gradient += entropy_gradient * len(actions)
            self.policy.log_std.grad = log_std_gradient
        self.actor.backward(values, gradient)


def is_mlp_policy(policy: Any) -> bool:
    """
    :param policy: any policy
    :return: whether :class:`MlpPolicy` computes what it computes
    """
    if not forward.is_standard(policy) or type(policy.mlp_extractor) not in _MLP_EXTRACTORS:
        return False
    if type(policy.action_dist) not in _DISTRIBUTIONS or type(policy.features_extractor) not in _EXTRACTORS:
        return False
    if any(True for _ in policy.features_extractor.parameters()):
        return False
    layers = [module for chain in _chains(policy) for module in chain if type(module) not in ACTIVATIONS]
    parameters = _parameters(policy)
    return (
        all(type(layer) is nn.Linear and layer.bias is not None for layer in layers)
        and all(len(chain) == 1 or type(chain[0]) is nn.Linear for chain in _chains(policy))
        and len(set(map(id, parameters))) == len(parameters)
        and not any(getattr(module, hooks) for module in policy.modules() for hooks in _HOOKS)
        and not any(getattr(parameter, hooks, None) for parameter in parameters for hooks in _PARAMETER_HOOKS)
    )


def _parameters(policy: Any) -> list[th.Tensor]:
    actor, critic = _chains(policy)
    log_std = [policy.log_std] if hasattr(policy, "log_std") else []
    return [*(parameter for module in (*actor, *critic) for parameter in module.parameters()), *log_std]


def _chains(policy: Any) -> tuple[list[nn.Module], list[nn.Module]]:
    extractor = policy.mlp_extractor
    return [*extractor.policy_net, policy.action_net], [*extractor.value_net, policy.value_net]


def _as_mlp(chain: list[nn.Module]) -> Mlp:
    layers = [module for module in chain if isinstance(module, nn.Linear)]
    return Mlp(layers, [ACTIVATIONS[type(module)] for module in chain if type(module) in ACTIVATIONS])
