"""
The dense networks of SB3's ``MlpPolicy`` as matrix products with a backward pass of their own. For networks this small,
modules and the recording of a graph cost more than the arithmetic.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch as th
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor
from torch import nn

from sb3_ppo_ewma._engine.recognition import PARAMETER_HOOKS, hooks, replaced_in
from sb3_ppo_ewma.distributions import GaussianForm, closed_form

_EXTRACTORS = (FlattenExtractor, CombinedExtractor)
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
    if inputs.device.type != "cpu":
        return th.tanh(product(bias, inputs, transposed))
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


class DenseNetwork:
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
        The derivative of one chain.

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


class DensePolicy:
    """
    Actor and critic of a policy whose networks are separate chains of dense layers behind features extractors without
    parameters.

    :param policy: a policy that :func:`unknown_networks` accepts
    """

    def __init__(self, policy: Any) -> None:
        actor, critic = chains(policy)
        self.parameters: list[th.Tensor] = [*_parameters(actor), *_parameters(critic)]
        self._n_actor, self._n_networks = len(_parameters(actor)), len(self.parameters)
        if "log_std" in policy._parameters:
            self.parameters.append(policy.log_std)
        self._activations = [
            [ACTIVATIONS[type(module)] for module in chain if type(module) in ACTIVATIONS] for chain in (actor, critic)
        ]

    def networks(self, parameters: Sequence[th.Tensor]) -> tuple[DenseNetwork, DenseNetwork, th.Tensor | None]:
        """
        :param parameters: tensors in the order of ``self.parameters``
        :return: actor and critic with these, ``log_std`` of Gaussian actions
        """
        actor, critic, others = self.parts(parameters)
        of_actor, of_critic = self._activations
        return DenseNetwork(actor, of_actor), DenseNetwork(critic, of_critic), others[0] if others else None

    def parts(self, parameters: Sequence[th.Tensor]) -> tuple[Sequence[th.Tensor], ...]:
        """
        :param parameters: tensors in the order of ``self.parameters``
        :return: those of the actor, those of the critic, the others
        """
        n, end = self._n_actor, self._n_networks
        return parameters[:n], parameters[n:end], parameters[end:]


def chains(policy: Any) -> tuple[list[nn.Module], list[nn.Module]]:
    """
    :param policy: a policy with SB3's ``MlpExtractor``
    :return: layers of the actor and of the critic, heads included
    """
    extractor = policy.mlp_extractor
    return [*extractor.policy_net, policy.action_net], [*extractor.value_net, policy.value_net]


def unknown_networks(policy: Any) -> str | None:
    """
    :param policy: a policy that the selection has recognised as a standard one
    :return: why :class:`DensePolicy` cannot represent it, ``None`` if it can
    """
    extractors = (policy.features_extractor, policy.pi_features_extractor, policy.vf_features_extractor)
    for extractor in extractors:
        if type(extractor) not in _EXTRACTORS:
            return f"the features extractor is a {type(extractor).__name__}"
        if not all(_flattens(module) for module in extractor.modules() if type(module) not in _EXTRACTORS):
            return "the features extractor does more than flatten"
    sequences = (policy.mlp_extractor.policy_net, policy.mlp_extractor.value_net)
    if not all(type(sequence) is nn.Sequential for sequence in sequences):
        return "the networks of the mlp_extractor are not an nn.Sequential"
    layers: list[nn.Module] = []
    for chain in chains(policy):
        if len(chain) % 2 == 0:
            return "the layers do not alternate between nn.Linear and an activation"
        for index, module in enumerate(chain):
            if index % 2 and type(module) not in ACTIVATIONS:
                return f"{type(module).__name__} is not one of the activations nn.Tanh, nn.ReLU"
            if index % 2 == 0 and (type(module) is not nn.Linear or module.bias is None):
                return f"a layer is a {type(module).__name__}, not an nn.Linear with bias"
        layers += chain
    flattening = [module for extractor in extractors for module in extractor.modules()]
    modules = [*flattening, policy.mlp_extractor, *sequences, *layers]
    if any(module._compiled_call_impl is not None for module in modules):
        return "a module is compiled"
    return replaced_in(modules) or hooks(modules)


def unknown_parameters(policy: Any) -> str | None:
    """
    :param policy: a policy that :func:`unknown_networks` accepts
    :return: why the parameters of its networks cannot be trained as one tensor, ``None`` if they can
    """
    parameters, optimizer = DensePolicy(policy).parameters, policy.optimizer
    if "log_std" in vars(policy) or "log_std" in policy._buffers:
        return "log_std is not a parameter"
    if "log_std" in policy._parameters and not isinstance(closed_form(policy.action_dist), GaussianForm):
        return "the action distribution does not use log_std"
    if len(set(map(id, parameters))) < len(parameters) or _overlap(parameters):
        return "layers share parameters or memory"
    if not all(type(parameter) is nn.Parameter and parameter.requires_grad for parameter in parameters):
        return "parameters are frozen or not an nn.Parameter"
    if len({(parameter.dtype, parameter.device) for parameter in parameters}) > 1:
        return "parameters differ in dtype or device"
    if any(getattr(parameter, name, None) for parameter in parameters for name in PARAMETER_HOOKS):
        return "parameters have hooks"
    if len(optimizer.param_groups) != 1:
        return f"the optimizer has {len(optimizer.param_groups)} parameter groups"
    if not set(map(id, parameters)) <= set(map(id, optimizer.param_groups[0]["params"])):
        return "the optimizer does not have all parameters"
    counts = {float(state["step"]) if (state := optimizer.state.get(parameter)) else 0.0 for parameter in parameters}
    return "the optimizer has made different numbers of steps with different parameters" if len(counts) > 1 else None


def _flattens(module: nn.Module) -> bool:
    if isinstance(module, nn.ModuleDict):
        return True
    return type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1)


def _overlap(tensors: Sequence[th.Tensor]) -> bool:
    """
    :param tensors: tensors on one device
    :return: whether two of them have memory in common, or one has gaps
    """
    spans = sorted((each.data_ptr(), each.data_ptr() + each.numel() * each.element_size()) for each in tensors)
    is_disjoint = all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    return not (is_disjoint and all(each.is_contiguous() for each in tensors))


def _parameters(chain: Sequence[nn.Module]) -> list[th.Tensor]:
    # Module.parameters() would search the modules within each of these, which takes longer.
    return [tensor for module in chain if isinstance(module, nn.Linear) for tensor in (module.weight, module.bias)]
