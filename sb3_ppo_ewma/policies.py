"""Policies with an auxiliary value head and a choice of critic architecture, and policies with the IMPALA network."""

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, cast, get_args

import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import DiagGaussianDistribution, Distribution
from stable_baselines3.common.policies import (
    ActorCriticCnnPolicy,
    ActorCriticPolicy,
    BasePolicy,
    MultiInputActorCriticPolicy,
)
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, MlpExtractor, create_mlp
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn

from sb3_ppo_ewma._arguments import check_choice, check_integer
from sb3_ppo_ewma.checkpointing.generators import preserved_generators
from sb3_ppo_ewma.distributions import SoftplusDiagGaussianDistribution
from sb3_ppo_ewma.ewma import ParameterEwma
from sb3_ppo_ewma.networks import ImpalaCNN, normalize_fan_in

CriticArch = Literal["dual", "shared", "detach"]
StdActivation = Literal["exp", "softplus"]

# Norm of each output unit's weights in the heads of the paper's network
_SMALL_HEAD = 0.1


class AuxiliaryHeadMixin(BasePolicy):
    """
    Adds to an actor-critic policy a linear auxiliary value head on the last layer of the policy network. Place it
    first: ``class MyPolicy(AuxiliaryHeadMixin, MyActorCriticPolicy)``.

    Source: Cobbe et al. 2020, https://arxiv.org/abs/2009.04416
    """

    aux_value_net: nn.Linear
    mlp_extractor: Any
    value_net: Any
    ortho_init: bool
    share_features_extractor: bool

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)  # type: ignore[misc]  # every actor-critic policy has it
        # Keep the random state: all other weights then equal those of a policy without this head.
        with preserved_generators(th.device("cpu")):
            self.aux_value_net = nn.Linear(self.mlp_extractor.latent_dim_pi, 1)
            self._initialize_aux_head(self.aux_value_net)
        # Rebuild the optimizer, which lacks the head's parameters.
        optimizer: Any = self.optimizer_class
        self.optimizer = optimizer(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)

    def _initialize_aux_head(self, head: nn.Linear) -> None:
        if self.ortho_init:
            head.apply(partial(self.init_weights, gain=1))  # as SB3's value head

    def evaluate_auxiliary(self, obs: PyTorchObs) -> tuple[Distribution, th.Tensor, th.Tensor]:
        """
        Compute in one forward pass all outputs that the auxiliary phase trains.

        :param obs: observations, (batch, ...)
        :return: action distribution; values V and auxiliary values V_aux, both (batch,)
        """
        features: Any = self.extract_features(obs)  # type: ignore[call-arg]  # the extractor is the policy's own
        pi_features, vf_features = (features, features) if isinstance(features, th.Tensor) else features
        latent_pi = self.mlp_extractor.forward_actor(pi_features)
        return self._auxiliary_outputs(latent_pi, self.mlp_extractor.forward_critic(vf_features))

    def _auxiliary_outputs(
        self, latent_pi: th.Tensor, latent_vf: th.Tensor
    ) -> tuple[Distribution, th.Tensor, th.Tensor]:
        values, aux_values = self.value_net(latent_vf), self.aux_value_net(latent_pi)
        distribution = self._get_action_dist_from_latent(latent_pi)  # type: ignore[operator]  # as above
        return distribution, values.flatten(), aux_values.flatten()


class CriticArchMixin(AuxiliaryHeadMixin):
    """
    Lets ``critic_arch`` set what critic and policy share.

    The trunk is the features extractor, followed by the layers of ``trunk_arch``; ``net_arch`` gives the separate
    layers of policy and critic after it. If the trunk has no weights (vector observations without ``trunk_arch``), the
    three architectures are equivalent.

    Arguments after ``net_arch`` are keyword-only.

    Source: Cobbe et al. 2020, https://arxiv.org/abs/2009.04416, and its released code.

    :param observation_space: as in ``ActorCriticPolicy``
    :param action_space: as in ``ActorCriticPolicy``
    :param lr_schedule: as in ``ActorCriticPolicy``
    :param net_arch: as in ``ActorCriticPolicy``
    :param critic_arch: ``"dual"``: policy and critic have separate trunks; ``"shared"``: both use one trunk;
        ``"detach"``: one trunk, which the value loss trains in neither phase
    :param trunk_arch: number of units in each fully-connected layer at the end of the trunk, activated by
        ``activation_fn``; ``None``: no layers
    :param std_activation: how Gaussian policies without gSDE parametrise the standard deviation. ``"exp"``: by its
        logarithm, as in SB3; ``"softplus"``: as
        :class:`~sb3_ppo_ewma.distributions.SoftplusDiagGaussianDistribution` does
    :param share_features_extractor: ``None``, or the value that ``critic_arch`` implies
    :param kwargs: other keyword arguments of the policy this is mixed into
    :raises ValueError: for an unknown choice, or one that contradicts another argument
    :raises TypeError: if ``trunk_arch`` is not a list of integers
    """

    activation_fn: type[nn.Module]
    action_dist: Any
    features_dim: int
    net_arch: Any

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        *,
        critic_arch: CriticArch = "dual",
        trunk_arch: list[int] | None = None,
        std_activation: StdActivation = "exp",
        share_features_extractor: bool | None = None,
        **kwargs: Any,
    ) -> None:
        check_choice("critic_arch", critic_arch, get_args(CriticArch))
        check_choice("std_activation", std_activation, get_args(StdActivation))
        shares = critic_arch != "dual"
        if share_features_extractor not in (None, shares):
            raise ValueError(
                f"share_features_extractor={share_features_extractor} contradicts critic_arch={critic_arch!r}: "
                f"leave it out, or use critic_arch={'dual' if shares else 'shared'!r}"
            )
        if not isinstance(trunk_arch, list | tuple | None):
            raise TypeError(f"trunk_arch must be a list of integers >= 1 or None, got {trunk_arch!r}")
        for units in trunk_arch or []:
            check_integer("every number in trunk_arch", units, minimum=1)
        self.critic_arch: CriticArch = critic_arch
        self.trunk_arch = list(trunk_arch or [])
        self.std_activation: StdActivation = std_activation
        build: Any = super().__init__  # of the policy this is mixed into
        build(observation_space, action_space, lr_schedule, net_arch, share_features_extractor=shares, **kwargs)

    def make_features_extractor(self) -> BaseFeaturesExtractor:
        """
        :return: a new trunk
        """
        extractor = super().make_features_extractor()
        return Trunk(extractor, self.trunk_arch, self.activation_fn) if self.trunk_arch else extractor

    def _build_mlp_extractor(self) -> None:
        if self.critic_arch != "detach":
            super()._build_mlp_extractor()  # type: ignore[misc]  # every actor-critic policy has it
            return
        self.mlp_extractor = DetachedCriticMlpExtractor(
            self.features_dim, net_arch=self.net_arch, activation_fn=self.activation_fn, device=self.device
        )

    def _build(self, lr_schedule: Schedule) -> None:
        if self.std_activation == "softplus":
            if not isinstance(self.action_dist, DiagGaussianDistribution):
                raise ValueError(
                    "std_activation='softplus' needs a Box action space and use_sde=False, got "
                    f"{self.action_space} and use_sde={getattr(self, 'use_sde', False)}; gSDE has use_expln"
                )
            self.action_dist = SoftplusDiagGaussianDistribution(self.action_dist.action_dim)
        super()._build(lr_schedule)
        if self.critic_arch == "detach" and not isinstance(self.mlp_extractor, DetachedCriticMlpExtractor):
            raise ValueError(
                f"critic_arch='detach' is not known to the mlp_extractor of {type(self).__name__}: detach the features "
                "in its forward_critic() and use critic_arch='shared'"
            )

    def _get_constructor_parameters(self) -> dict[str, Any]:
        own = {
            "critic_arch": self.critic_arch,
            "trunk_arch": self.trunk_arch,
            "std_activation": self.std_activation,
        }
        return {**super()._get_constructor_parameters(), **own}


class PPGPolicy(CriticArchMixin, ActorCriticPolicy):
    """
    SB3's actor-critic policy for Phasic Policy Gradient: with the auxiliary value head of :class:`AuxiliaryHeadMixin`
    and the parameters of :class:`CriticArchMixin`.
    """


class PPGCnnPolicy(PPGPolicy, ActorCriticCnnPolicy):
    """:class:`PPGPolicy` with SB3's ``NatureCNN`` as default features extractor."""


class PPGMultiInputPolicy(PPGPolicy, MultiInputActorCriticPolicy):
    """:class:`PPGPolicy` for dictionary observations, with SB3's ``CombinedExtractor``."""


class ImpalaPolicy(ActorCriticPolicy):
    """
    SB3's actor-critic policy with the network of the PPG paper: :class:`~sb3_ppo_ewma.ImpalaCNN`, directly followed by
    the heads, whose initial weights have norm 0.1 for every output.

    :param observation_space: space of images, (channels, height, width) or (height, width, channels)
    :param action_space: as in ``ActorCriticPolicy``
    :param lr_schedule: as in ``ActorCriticPolicy``
    :param net_arch: as in ``ActorCriticPolicy``, ``None``: no layers
    :param ortho_init: whether to use SB3's orthogonal initialisation instead
    :param features_extractor_class: as in ``ActorCriticPolicy``
    :param kwargs: other keyword arguments of ``ActorCriticPolicy``
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        *,
        ortho_init: bool = False,
        features_extractor_class: type[BaseFeaturesExtractor] = ImpalaCNN,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            [] if net_arch is None else net_arch,
            ortho_init=ortho_init,
            features_extractor_class=features_extractor_class,
            **kwargs,
        )

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        if not self.ortho_init:
            for head in (self.action_net, self.value_net):
                if isinstance(head, nn.Linear):
                    normalize_fan_in(head, _SMALL_HEAD)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        # SB3 omits this one: a policy with two extractors would be loaded with a shared one.
        return {
            **super()._get_constructor_parameters(),
            "share_features_extractor": self.share_features_extractor,
        }


class PPGImpalaPolicy(PPGPolicy, ImpalaPolicy):
    """:class:`PPGPolicy` with the network of :class:`ImpalaPolicy`."""

    def _initialize_aux_head(self, head: nn.Linear) -> None:
        if self.ortho_init:
            super()._initialize_aux_head(head)
        else:
            normalize_fan_in(head, _SMALL_HEAD)


class Trunk(BaseFeaturesExtractor):
    """
    A features extractor followed by fully-connected layers.

    :param extractor: the features extractor
    :param units: number of units in each layer, at least one layer
    :param activation_fn: activation after each layer
    """

    def __init__(self, extractor: BaseFeaturesExtractor, units: list[int], activation_fn: type[nn.Module]) -> None:
        super().__init__(extractor._observation_space, units[-1])
        self.extractor = extractor
        self.mlp = nn.Sequential(*create_mlp(extractor.features_dim, -1, units, activation_fn))

    def forward(self, observations: Any) -> th.Tensor:
        """
        :param observations: preprocessed observations
        :return: (batch, units[-1])
        """
        features: th.Tensor = self.mlp(self.extractor(observations))
        return features


class DetachedCriticMlpExtractor(MlpExtractor):
    """Keeps the gradient of the value function out of the features."""

    def forward_critic(self, features: th.Tensor) -> th.Tensor:
        """
        :param features: (batch, features_dim)
        :return: output of the value network's last layer, (batch, latent_dim_vf)
        """
        return super().forward_critic(features.detach())


def copy_policy(
    policy: Any, average: ParameterEwma | None = None, policy_kwargs: Mapping[str, Any] | None = None
) -> Any:
    """
    :param policy: a policy of SB3
    :param average: an average of its parameters, to copy in their place
    :param policy_kwargs: what it was built with. SB3's policies leave some of it out of what they save
        (``share_features_extractor``, the LSTM's size), and come back without when they are saved alone
    :return: an independent copy in evaluation mode, without gradients
    :raises ValueError: if it cannot be copied
    """
    policy = uncompiled(policy)
    for module in policy.modules():
        if "forward" in vars(module):
            raise ValueError(f"the policy cannot be copied: forward of a {type(module).__name__} was replaced")
    # The last distribution may have a graph, which cannot be copied; the next forward pass makes another.
    memo = {id(policy.action_dist): copy.copy(policy.action_dist), id(policy.optimizer): None}
    try:
        copied = copy.deepcopy(policy, memo)
    except Exception as error:
        raise ValueError(f"the policy cannot be copied: {error}") from error
    if average is not None:
        tensors = dict(zip(average.names, average.averages, strict=True))
        for name, parameter in copied.named_parameters():
            if name in tensors:
                parameter.data = tensors[name].clone()
    copied.optimizer = policy.optimizer_class(copied.parameters(), lr=1.0, **policy.optimizer_kwargs)
    constructor_parameters = copied._get_constructor_parameters
    copied._get_constructor_parameters = partial(_merged, constructor_parameters, dict(policy_kwargs or {}))
    return copied.requires_grad_(False).eval()


def _merged(inherited: Any, policy_kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**policy_kwargs, **inherited()}


def uncompiled(module: th.nn.Module) -> th.nn.Module:
    """
    Undo ``torch.compile``, which gives parameters other names.

    :param module: a module, compiled or not
    :return: the module that was compiled
    """
    return cast(th.nn.Module, getattr(module, "_orig_mod", module))
