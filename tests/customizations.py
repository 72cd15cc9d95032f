"""What users do to a model: replaced modules, methods and tensors, hooks, other optimisers, overridden methods."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from torch import nn
from torch.nn.utils import parametrizations

Moment = Literal["start", "rollout start", "rollout end", "step", "between"]


class Customization(NamedTuple):
    """
    A change of a model.

    :param change: makes it, ``None``: the classes are all
    :param moment: before training; at the start or end of the second rollout, or in the middle of it; between two
        calls of ``learn()``
    :param needs_layers: whether the networks of the policy must have one layer each
    :param policy: overrides methods of the policy
    :param model: overrides methods of the algorithm
    :param model_kwargs: arguments of the algorithm
    :param only: which policies it is for, by a part of their names or of the action space's
    """

    change: Callable[[Any], Any] | None = None
    moment: Moment = "start"
    needs_layers: bool = False
    policy: Any = None
    model: Any = None
    model_kwargs: dict[str, Any] = {}  # noqa: RUF012  # never changed
    only: str = ""

    def fits(self, case: Any) -> bool:
        """
        :param case: a training
        :return: whether it can be customised so
        """
        names = f" {case.cls.__name__} {case.policy} {case.actions} {case.observations}"
        is_plain = case.cls.__name__ in ("PPOEWMA", "PPG", "PPGEWMA")
        return self.only in names and (self.policy is None or is_plain)

    def apply(self, model: Any) -> None:
        """
        :param model: to be customised
        """
        if self.change is not None:
            self.change(model)


def new_optimizer(model: Any) -> None:
    """Give the policy's present parameters to a new optimiser with the same settings."""
    policy = model.policy
    policy.optimizer = policy.optimizer_class(policy.parameters(), lr=0.01, **policy.optimizer_kwargs)


def new_head(model: Any) -> None:
    """Replace the critic's head by one with other weights, and the optimiser."""
    head = model.policy.value_net
    model.policy.value_net = nn.Linear(head.in_features, 1)
    with th.no_grad():
        model.policy.value_net.weight.fill_(0.1)
        model.policy.value_net.bias.fill_(0.3)
    new_optimizer(model)


def head_of_two_layers(model: Any) -> None:
    head = model.policy.action_net
    model.policy.action_net = nn.Sequential(nn.Tanh(), head)
    new_optimizer(model)


def forgotten_head(model: Any) -> None:
    """The optimiser does not have the new head."""
    optimizer = model.policy.optimizer
    new_head(model)
    model.policy.optimizer = optimizer


def patch_method(owner: Callable[[Any], Any], name: str, make: Callable[[Any], Any]) -> Callable[[Any], None]:
    """:return: replaces a method in an instance"""

    def change(model: Any) -> None:
        instance = owner(model)
        setattr(instance, name, make(getattr(instance, name)))

    return change


def doubled(method: Any) -> Any:
    return lambda *args, **kwargs: 2 * method(*args, **kwargs)


def more_value(method: Any) -> Any:
    def evaluate_actions(*args: Any, **kwargs: Any) -> Any:
        values, log_prob, entropy = method(*args, **kwargs)
        return values + 1, log_prob, entropy

    return evaluate_actions


def freeze(*parts: str) -> Callable[[Any], None]:
    """:return: freezes all parameters with one of these in their names; torch refuses a loss without any"""

    def change(model: Any) -> None:
        for name, parameter in model.policy.named_parameters():
            if any(part in name for part in parts):
                parameter.requires_grad_(False)

    return change


def tie(model: Any) -> None:
    """Both heads' networks share the weight of their layer, where its shape allows it."""
    extractor = model.policy.mlp_extractor
    if extractor.value_net[0].weight.shape == extractor.policy_net[0].weight.shape:
        extractor.value_net[0].weight = extractor.policy_net[0].weight


def tie_with_new_optimizer(model: Any) -> None:
    tie(model)
    new_optimizer(model)


def give_groups(model: Any) -> None:
    parameters = list(model.policy.parameters())
    groups = [{"params": parameters[:2], "betas": (0.5, 0.9)}, {"params": parameters[2:], "weight_decay": 0.1}]
    model.policy.optimizer = th.optim.Adam(groups, lr=0.01, eps=1e-5)


def reverse_order(model: Any) -> None:
    model.policy.optimizer = th.optim.Adam(list(model.policy.parameters())[::-1], lr=0.01, eps=1e-5)


def leave_out(model: Any) -> None:
    model.policy.optimizer = th.optim.Adam(list(model.policy.parameters())[1:], lr=0.01, eps=1e-5)


def step_one_parameter(model: Any) -> None:
    """One parameter has made a step more than the others."""
    parameter = model.policy.value_net.bias
    parameter.grad = th.ones_like(parameter)
    model.policy.optimizer.step()


class OwnAdam(th.optim.Adam):
    """Steps twice."""

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        return super().step(closure)


def own_adam(model: Any) -> None:
    model.policy.optimizer = OwnAdam(model.policy.parameters(), lr=0.01, eps=1e-5)


def scale_gradients(model: Any) -> None:
    """A hook of the optimiser."""

    def scale(optimizer: Any, *_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(0.5)

    model.policy.optimizer.register_step_pre_hook(scale)


def scale_gradients_in_step(model: Any) -> None:
    """The optimiser's method is replaced."""
    optimizer = model.policy.optimizer
    step = optimizer.step

    def scaled(*args: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.add_(0.1)
        step(*args)

    optimizer.step = scaled


def change_betas(model: Any) -> None:
    if "betas" in model.policy.optimizer.param_groups[0]:
        model.policy.optimizer.param_groups[0]["betas"] = (0.3, 0.6)


def ordered(buffer: Any) -> Callable[..., Any]:
    """:return: minibatches that are not shuffled"""

    def get(batch_size: int | None = None) -> Any:
        next(RolloutBuffer.get(buffer, batch_size))  # flattens the arrays
        size = buffer.buffer_size * buffer.n_envs
        step = batch_size or size
        return (buffer._get_samples(np.arange(i, min(i + step, size))) for i in range(0, size, step))

    return get


def unshuffle(model: Any) -> None:
    model.rollout_buffer.get = ordered(model.rollout_buffer)


class OrderedBuffer(RolloutBuffer):
    """Does not shuffle."""

    def get(self, batch_size: int | None = None) -> Any:
        return ordered(self)(batch_size)


@th.no_grad()
def shrink(model: Any) -> None:
    """Change weights in place."""
    for parameter in model.policy.parameters():
        parameter.mul_(0.8)


def shrink_data(model: Any) -> None:
    """Give parameters other tensors."""
    for parameter in model.policy.parameters():
        parameter.data = parameter.data * 0.8


def transpose_in_memory(model: Any) -> None:
    for parameter in model.policy.parameters():
        if parameter.dim() == 2:
            parameter.data = parameter.data.t().contiguous().t()


def load_from_vector(model: Any) -> None:
    parameters = list(model.policy.parameters())
    model.policy.load_from_vector(model.policy.parameters_to_vector() * 0.9)
    for parameter in parameters:
        parameter.data = parameter.data.to(th.get_default_dtype())  # SB3 makes single precision of all


def load_state(model: Any) -> None:
    state = {
        name: value * 0.7 if value.is_floating_point() else value for name, value in model.policy.state_dict().items()
    }
    model.policy.load_state_dict(state)


def set_parameters(model: Any) -> None:
    model.set_parameters(model.get_parameters())


def load_optimizer(model: Any) -> None:
    model.policy.optimizer.load_state_dict(model.policy.optimizer.state_dict())


def clear_optimizer(model: Any) -> None:
    model.policy.optimizer.state.clear()


def double_gradient(model: Any) -> None:
    next(model.policy.parameters()).register_hook(lambda gradient: 2 * gradient)


def clear_gradient(model: Any) -> None:
    def clear(parameter: Any) -> None:
        parameter.grad.zero_()

    model.policy.action_net.weight.register_post_accumulate_grad_hook(clear)


def weight_norm(model: Any) -> None:
    parametrizations.weight_norm(model.policy.action_net)
    new_optimizer(model)


def other_activation(model: Any) -> None:
    for network in (model.policy.mlp_extractor.policy_net, model.policy.mlp_extractor.value_net):
        network[1] = nn.Softsign()


class SoftLinear(nn.Linear):
    """A linear layer with bounded outputs."""

    def forward(self, inputs: th.Tensor) -> th.Tensor:
        return th.tanh(super().forward(inputs))


def other_layer(model: Any) -> None:
    old = model.policy.action_net
    model.policy.action_net = SoftLinear(old.in_features, old.out_features)
    new_optimizer(model)


def without_bias(model: Any) -> None:
    old = model.policy.value_net
    model.policy.value_net = nn.Linear(old.in_features, 1, bias=False)
    new_optimizer(model)


def exchange_networks(model: Any) -> None:
    extractor = model.policy.mlp_extractor
    extractor.value_net, extractor.policy_net = extractor.policy_net, extractor.value_net


def one_network(model: Any) -> None:
    """Actor and critic share their layers, where the shapes allow it."""
    extractor = model.policy.mlp_extractor
    if extractor.value_net[0].weight.shape == extractor.policy_net[0].weight.shape:
        extractor.value_net = extractor.policy_net


@th.no_grad()
def extreme_outputs(model: Any) -> None:
    """Probabilities underflow."""
    model.policy.action_net.weight.mul_(1000 if model.policy.action_net.bias.numel() > 2 else 30)


def raw_images(model: Any) -> None:
    model.policy.normalize_images = False


def own_distribution(model: Any) -> None:
    """Replace the distribution by an instance of a class of its own."""
    distribution = model.policy.action_dist
    cls = type(distribution)

    def log_prob(self: Any, actions: Any, *args: Any) -> Any:
        return 0.5 * cls.log_prob(self, actions, *args)

    distribution.__class__ = type("Own", (cls,), {"log_prob": log_prob})


def new_policy(model: Any) -> None:
    """Another policy object with other weights."""
    old = model.policy
    arguments = {**model.policy_kwargs, **({"use_sde": True} if model.use_sde else {})}
    model.policy = type(old)(model.observation_space, model.action_space, model.lr_schedule, **arguments)
    with th.no_grad():
        for parameter in model.policy.parameters():
            parameter.mul_(0.9)


class EvaluateActions:
    """Overrides what training calls."""

    def evaluate_actions(self: Any, *args: Any, **kwargs: Any) -> Any:
        return more_value(super().evaluate_actions)(*args, **kwargs)


class EvaluateAuxiliary:
    """Overrides what the auxiliary phase calls."""

    def evaluate_auxiliary(self: Any, obs: Any) -> Any:
        distribution, values, aux_values = super().evaluate_auxiliary(obs)
        return distribution, values, 2 * aux_values


class ExtractFeatures:
    """Overrides what everything calls."""

    def extract_features(self: Any, *args: Any, **kwargs: Any) -> Any:
        features = super().extract_features(*args, **kwargs)
        return tuple(2 * each for each in features) if isinstance(features, tuple) else 2 * features


class DistributionFromLatent:
    """Overrides a helper."""

    def _get_action_dist_from_latent(self: Any, latent_pi: th.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super()._get_action_dist_from_latent(0.5 * latent_pi, *args, **kwargs)


class Forward:
    """Overrides what collection calls."""

    def forward(self: Any, obs: Any, deterministic: bool = False) -> Any:
        actions, values, log_prob = super().forward(obs, deterministic)
        return actions, values + 0.3, log_prob


class EntropyBonus:
    """A further term of the loss."""

    def extra_loss(self: Any, evaluation: Any, minibatch: Any) -> th.Tensor:
        return 0.1 * (evaluation.values**2).mean() + 0.01 * evaluation.log_prob.mean()


def _policy(model: Any) -> Any:
    return model.policy


def _action_net(model: Any) -> Any:
    return model.policy.action_net


def _critic_layer(model: Any) -> Any:
    return model.policy.mlp_extractor.value_net[0]


def hook(owner: Callable[[Any], Any], register: str, function: Callable[..., Any]) -> Callable[[Any], Any]:
    """:return: registers a hook"""
    return lambda model: getattr(owner(model), register)(function)


CUSTOMIZATIONS: dict[str, Customization] = {
    "head replaced": Customization(new_head),
    "head replaced, old optimizer": Customization(forgotten_head),
    "head of two layers": Customization(head_of_two_layers),
    "head of another class": Customization(other_layer),
    "head without bias": Customization(without_bias),
    "activation replaced": Customization(other_activation, needs_layers=True),
    "networks exchanged": Customization(exchange_networks, needs_layers=True),
    "one network": Customization(one_network, needs_layers=True),
    "weight norm": Customization(weight_norm),
    "tied": Customization(tie, needs_layers=True),
    "tied, new optimizer": Customization(tie_with_new_optimizer, needs_layers=True),
    "forward patched": Customization(patch_method(_action_net, "forward", doubled)),
    "forward of a layer patched": Customization(patch_method(_critic_layer, "forward", doubled), needs_layers=True),
    "evaluate_actions patched": Customization(patch_method(_policy, "evaluate_actions", more_value)),
    "forward hook": Customization(hook(_action_net, "register_forward_hook", lambda m, i, o: 1.5 * o)),
    "pre-hook": Customization(
        hook(_critic_layer, "register_forward_pre_hook", lambda m, i: (0.5 * i[0],)), needs_layers=True
    ),
    "backward hook": Customization(
        hook(_action_net, "register_full_backward_hook", lambda m, i, o: (0.5 * i[0],)), needs_layers=True
    ),
    "hook of a parameter": Customization(double_gradient),
    "hook after accumulation": Customization(clear_gradient),
    "critic frozen": Customization(freeze("value_net.0", "value_net.weight", "vf_")),
    "actor frozen": Customization(freeze("policy_net", "action_net.weight", "log_std")),
    "log_std frozen": Customization(freeze("log_std"), only="box"),
    "one layer frozen": Customization(freeze("policy_net.0", "features_extractor.cnn.0")),
    "frozen later": Customization(freeze("value_net.weight"), moment="rollout start"),
    "groups": Customization(give_groups),
    "order reversed": Customization(reverse_order),
    "one left out": Customization(leave_out),
    "counts differ": Customization(step_one_parameter),
    "own Adam": Customization(own_adam),
    "hook of the optimizer": Customization(scale_gradients),
    "step patched": Customization(scale_gradients_in_step),
    "betas changed": Customization(change_betas, moment="rollout start"),
    "get patched": Customization(unshuffle, only=" PPOEWMA Mlp"),
    "own buffer": Customization(model_kwargs={"rollout_buffer_class": OrderedBuffer}, only=" PPOEWMA Mlp"),
    "attribute of the policy": Customization(raw_images, only="Cnn"),
    "log_prob patched": Customization(patch_method(lambda model: model.policy.action_dist, "log_prob", doubled)),
    "entropy patched": Customization(patch_method(lambda model: model.policy.action_dist, "entropy", doubled)),
    "own distribution": Customization(own_distribution),
    "evaluate_actions overridden": Customization(policy=EvaluateActions),
    "evaluate_auxiliary overridden": Customization(policy=EvaluateAuxiliary, only="PPG"),
    "extract_features overridden": Customization(policy=ExtractFeatures),
    "helper overridden": Customization(policy=DistributionFromLatent),
    "forward overridden": Customization(policy=Forward),
    "extra loss": Customization(model=EntropyBonus),
    "weights at the start of a rollout": Customization(shrink, moment="rollout start"),
    "weights in a rollout": Customization(shrink, moment="step"),
    "weights at the end of a rollout": Customization(shrink, moment="rollout end"),
    "data in a rollout": Customization(shrink_data, moment="step"),
    "vector in a rollout": Customization(load_from_vector, moment="step"),
    "head in a rollout": Customization(new_head, moment="step"),
    "activation in a rollout": Customization(other_activation, moment="step", needs_layers=True),
    "hook in a rollout": Customization(
        hook(_action_net, "register_forward_hook", lambda m, i, o: 1.5 * o), moment="step"
    ),
    "patch in a rollout": Customization(patch_method(_action_net, "forward", doubled), moment="step"),
    "distribution in a rollout": Customization(
        patch_method(lambda model: model.policy.action_dist, "log_prob", doubled), moment="step"
    ),
    "extreme outputs": Customization(extreme_outputs),
    "memory layout": Customization(transpose_in_memory),
    "state loaded": Customization(load_state, moment="between"),
    "parameters set": Customization(set_parameters, moment="between"),
    "optimizer loaded": Customization(load_optimizer, moment="between"),
    "optimizer cleared": Customization(clear_optimizer, moment="between"),
    "new policy": Customization(new_policy, moment="between", only="Mlp"),
}
