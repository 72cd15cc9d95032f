"""
The dense networks of SB3's ``MlpPolicy`` as matrix products with a backward pass of their own. For networks this small,
modules and the recording of a graph cost more than the arithmetic.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch as th
from stable_baselines3.common.distributions import CategoricalDistribution, DiagGaussianDistribution
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, MlpExtractor
from torch import nn

from sb3_ppo_ewma._engine import forward
from sb3_ppo_ewma.policies import DetachedCriticMlpExtractor

_MLP_EXTRACTORS = (MlpExtractor, DetachedCriticMlpExtractor)
_EXTRACTORS = (FlattenExtractor, CombinedExtractor)
_DISTRIBUTIONS = (CategoricalDistribution, DiagGaussianDistribution)
_ONE = th.ones((), device="cpu")


class Activation(NamedTuple):
    """
    An activation function after a linear layer, and its derivative.

    :param layer: from matrix product, bias, inputs and transposed weight of the layer to its outputs
    :param backward: from the derivative with respect to the outputs, and these, to that before the activation
    """

    layer: Callable[[Callable[..., th.Tensor], th.Tensor, th.Tensor, th.Tensor], th.Tensor]
    backward: Callable[[th.Tensor, th.Tensor], th.Tensor]


def _tanh_layer(
    product: Callable[..., th.Tensor], bias: th.Tensor, inputs: th.Tensor, transposed: th.Tensor
) -> th.Tensor:
    return th.tanh(product(bias, inputs, transposed))


def _quick_tanh_layer(
    product: Callable[..., th.Tensor], bias: th.Tensor, inputs: th.Tensor, transposed: th.Tensor
) -> th.Tensor:
    if inputs.device.type != "cpu":
        return _tanh_layer(product, bias, inputs, transposed)
    # tanh(x) = 1 − 2σ(−2x), within rounding of 1: on a CPU, torch's tanh takes three times as long as its sigmoid.
    return th.add(_ONE, product(bias, inputs, transposed, beta=-2, alpha=-2).sigmoid_(), alpha=-2)


def _relu_layer(
    product: Callable[..., th.Tensor], bias: th.Tensor, inputs: th.Tensor, transposed: th.Tensor
) -> th.Tensor:
    return th.relu(product(bias, inputs, transposed))


def _relu_backward(gradient: th.Tensor, outputs: th.Tensor) -> th.Tensor:
    result: th.Tensor = th.ops.aten.threshold_backward(gradient, outputs, 0)
    return result


ACTIVATIONS: dict[type[nn.Module], Activation] = {
    nn.Tanh: Activation(_tanh_layer, th.ops.aten.tanh_backward.default),
    nn.ReLU: Activation(_relu_layer, _relu_backward),
}
_QUICK: dict[type[nn.Module], Activation] = {
    **ACTIVATIONS,
    nn.Tanh: Activation(_quick_tanh_layer, th.ops.aten.tanh_backward.default),
}


class Mlp:
    """
    A chain of fully-connected layers, or n of them that are evaluated together.

    :param parameters: weight and bias of each layer in turn, with n as their first dimension if there are several
    :param activations: between the layers, one fewer
    """

    def __init__(self, parameters: Sequence[th.Tensor], activations: Sequence[Activation]) -> None:
        weights, biases = parameters[::2], parameters[1::2]
        is_one = weights[0].dim() == 2
        self._product: Callable[..., th.Tensor] = th.addmm if is_one else th.baddbmm
        self._layers = [
            (weight, weight.mT, bias if is_one else bias.unsqueeze(1))
            for weight, bias in zip(weights, biases, strict=True)
        ]
        self._activations = activations

    def forward(self, inputs: th.Tensor) -> list[th.Tensor]:
        """
        :param inputs: (batch, inputs), or (n, batch, inputs)
        :return: inputs of all layers and, last, the outputs
        """
        values, product = [inputs], self._product
        for (_, transposed, bias), activation in zip(self._layers, self._activations, strict=False):
            values.append(activation.layer(product, bias, values[-1], transposed))
        _, transposed, bias = self._layers[-1]
        values.append(product(bias, values[-1], transposed))
        return values

    def backward(
        self, values: list[th.Tensor], gradient: th.Tensor, out: Sequence[th.Tensor] | None = None
    ) -> list[th.Tensor]:
        """
        Of one chain.

        :param values: from :meth:`forward`
        :param gradient: derivative with respect to the outputs
        :param out: where to put the results
        :return: derivatives with respect to the parameters, in their order
        """
        gradients: list[th.Tensor] = []
        for index in range(len(self._layers) - 1, -1, -1):
            weight_out, bias_out = (None, None) if out is None else out[2 * index : 2 * index + 2]
            gradients.append(th.sum(gradient, 0, out=bias_out))
            gradients.append(th.mm(gradient.t(), values[index], out=weight_out))
            if index > 0:
                weight = self._layers[index][0]
                gradient = self._activations[index - 1].backward(th.mm(gradient, weight), values[index])
        return gradients[::-1]


class MlpPolicy(forward.StandardPolicy):
    """
    Actor and critic of a policy whose networks are separate chains of dense layers behind a features extractor without
    parameters.

    :param policy: for which :func:`is_mlp_policy` holds
    """

    def __init__(self, policy: Any) -> None:
        super().__init__(policy)
        self.parameters = _parameters(policy)
        # Of the actor, of both networks
        actor, critic = (len(_weights_and_biases(chain)) for chain in _chains(policy))
        self._n_parameters = actor, actor + critic
        self._activations, self._quick_activations = (
            [[kinds[type(module)] for module in chain if type(module) in kinds] for chain in _chains(policy)]
            for kinds in (ACTIVATIONS, _QUICK)
        )
        self._actor, self._critic, _ = self.networks(self.parameters)

    def networks(self, parameters: Sequence[th.Tensor], quick: bool = False) -> tuple[Mlp, Mlp, th.Tensor | None]:
        """
        :param parameters: in the order of ``self.parameters``
        :param quick: whether last digits may differ from those of the policy
        :return: actor and critic with these, logarithm of the standard deviation of Gaussian actions
        """
        actor, critic, others = self.parts(parameters)
        of_actor, of_critic = self._quick_activations if quick else self._activations
        return Mlp(actor, of_actor), Mlp(critic, of_critic), others[0] if others else None

    def parts(self, parameters: Sequence[th.Tensor]) -> tuple[Sequence[th.Tensor], ...]:
        """
        :param parameters: in the order of ``self.parameters``, or what belongs to each
        :return: those of the actor, of the critic and the others
        """
        n, end = self._n_parameters
        return parameters[:n], parameters[n:end], parameters[end:]

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
        return self._actor.forward(features)[-1], self._critic.forward(features)[-1]

    def action_outputs(self, obs: Any) -> th.Tensor:
        """
        :param obs: observations
        :return: outputs of ``policy.action_net``
        """
        return self._actor.forward(self.features(obs))[-1]


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
        and not forward.has_hooks(policy)
    )


def _parameters(policy: Any) -> list[th.Tensor]:
    actor, critic = _chains(policy)
    log_std = [policy.log_std] if hasattr(policy, "log_std") else []
    return [*_weights_and_biases(actor), *_weights_and_biases(critic), *log_std]


def _weights_and_biases(chain: Sequence[nn.Module]) -> list[th.Tensor]:
    # Module.parameters() would search the modules within each of these, which takes longer.
    return [tensor for module in chain if isinstance(module, nn.Linear) for tensor in (module.weight, module.bias)]


def _chains(policy: Any) -> tuple[list[nn.Module], list[nn.Module]]:
    extractor = policy.mlp_extractor
    return [*extractor.policy_net, policy.action_net], [*extractor.value_net, policy.value_net]
