"""Policies for the families of sb3-contrib: recurrent ones with masks, and both with an auxiliary value head."""

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch as th
from gymnasium import spaces
from sb3_contrib.common.maskable.policies import (
    MaskableActorCriticCnnPolicy,
    MaskableActorCriticPolicy,
    MaskableMultiInputActorCriticPolicy,
)
from sb3_contrib.common.recurrent.policies import (
    RecurrentActorCriticCnnPolicy,
    RecurrentActorCriticPolicy,
    RecurrentMultiInputActorCriticPolicy,
)
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule

from sb3_ppo_ewma.contrib.masking import masked_distribution
from sb3_ppo_ewma.policies import AuxiliaryHeadMixin, CriticArchMixin

AuxiliaryOutputs = tuple[Distribution, th.Tensor, th.Tensor]

# === Masks, recurrent ===


class MaskedRecurrentMixin(RecurrentActorCriticPolicy):
    """
    Gives a recurrent policy masks: its methods take ``action_masks``, (batch, n) True for valid values. Place it first.
    """

    _action_masks: Any = None

    def _build(self, lr_schedule: Schedule) -> None:
        self.action_dist = masked_distribution(self.action_space)
        super()._build(lr_schedule)

    def make_features_extractor(self) -> BaseFeaturesExtractor:
        """
        :return: a new features extractor
        """
        return _with_integer_dimension(super().make_features_extractor())

    @contextlib.contextmanager
    def masked(self, action_masks: Any) -> Iterator[None]:
        """
        Within this context, all distributions of the policy are masked.

        :param action_masks: (batch, n) the masks; ``None``: all actions are valid
        """
        before, self._action_masks = self._action_masks, action_masks
        try:
            yield
        finally:
            self._action_masks = before

    def _get_action_dist_from_latent(self, latent_pi: th.Tensor) -> Distribution:
        distribution: Any = super()._get_action_dist_from_latent(latent_pi)
        if self._action_masks is not None:
            distribution.apply_masking(self._action_masks)
        return cast(Distribution, distribution)

    def forward(  # type: ignore[override]  # as in sb3-contrib
        self,
        obs: th.Tensor,
        lstm_states: RNNStates,
        episode_starts: th.Tensor,
        deterministic: bool = False,
        action_masks: Any = None,
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor, RNNStates]:
        """
        :param obs: observations
        :param lstm_states: hidden and cell states of actor and critic
        :param episode_starts: (batch,) whether observations begin episodes
        :param deterministic: take the most likely actions
        :param action_masks: (batch, n) the masks
        :return: actions, values, log-probabilities, new states
        """
        with self.masked(action_masks):
            return super().forward(obs, lstm_states, episode_starts, deterministic)

    def get_distribution(  # type: ignore[override]  # as in sb3-contrib
        self, obs: th.Tensor, lstm_states: Any, episode_starts: th.Tensor, action_masks: Any = None
    ) -> tuple[Distribution, tuple[th.Tensor, ...]]:
        """
        :param obs: observations
        :param lstm_states: hidden and cell states of the actor
        :param episode_starts: (batch,) whether observations begin episodes
        :param action_masks: (batch, n) the masks
        :return: action distribution, new states
        """
        with self.masked(self._action_masks if action_masks is None else action_masks):
            return super().get_distribution(obs, lstm_states, episode_starts)

    def evaluate_actions(  # type: ignore[override]  # as in sb3-contrib
        self,
        obs: th.Tensor,
        actions: th.Tensor,
        lstm_states: RNNStates,
        episode_starts: th.Tensor,
        action_masks: Any = None,
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        :param obs: observations
        :param actions: actions
        :param lstm_states: hidden and cell states of actor and critic
        :param episode_starts: (batch,) whether observations begin episodes
        :param action_masks: (batch, n) the masks
        :return: values, log-probabilities and entropies
        """
        with self.masked(action_masks):
            return super().evaluate_actions(obs, actions, lstm_states, episode_starts)

    def predict(
        self,
        observation: Any,
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        action_masks: Any = None,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """
        As in sb3-contrib.

        :param observation: observations
        :param state: hidden and cell states of the actor, ``None``: zero
        :param episode_start: (n_envs,) whether observations begin episodes
        :param deterministic: take the most likely actions
        :param action_masks: (n_envs, n) the masks; ``None``: all actions are valid
        :return: actions, new states
        """
        with self.masked(action_masks):
            return super().predict(observation, state, episode_start, deterministic)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), **_lstm_parameters(self)}


class MaskedLstmPolicy(MaskedRecurrentMixin, RecurrentActorCriticPolicy):
    """sb3-contrib's ``RecurrentActorCriticPolicy`` with masks."""


class MaskedCnnLstmPolicy(MaskedRecurrentMixin, RecurrentActorCriticCnnPolicy):
    """sb3-contrib's ``RecurrentActorCriticCnnPolicy`` with masks."""


class MaskedMultiInputLstmPolicy(MaskedRecurrentMixin, RecurrentMultiInputActorCriticPolicy):
    """sb3-contrib's ``RecurrentMultiInputActorCriticPolicy`` with masks."""


def _lstm_parameters(policy: RecurrentActorCriticPolicy) -> dict[str, Any]:
    """
    :param policy: a recurrent policy
    :return: what sb3-contrib leaves out of the parameters that it was built with
    """
    return {
        "lstm_hidden_size": policy.lstm_output_dim,
        "n_lstm_layers": policy.lstm_actor.num_layers,
        "shared_lstm": policy.shared_lstm,
        "enable_critic_lstm": policy.enable_critic_lstm,
        "lstm_kwargs": policy.lstm_kwargs,
        "share_features_extractor": policy.share_features_extractor,
    }


def _with_integer_dimension(extractor: BaseFeaturesExtractor) -> BaseFeaturesExtractor:
    # A MultiDiscrete space gives an integer of numpy, which an LSTM refuses.
    extractor._features_dim = int(extractor._features_dim)
    return extractor


# === Auxiliary value head ===


class MaskablePPGPolicy(CriticArchMixin, MaskableActorCriticPolicy):
    """
    sb3-contrib's ``MaskableActorCriticPolicy`` for Phasic Policy Gradient, with the parameters of
    :class:`~sb3_ppo_ewma.policies.CriticArchMixin`.
    """

    def evaluate_auxiliary(self, obs: PyTorchObs, action_masks: Any = None) -> AuxiliaryOutputs:
        """
        :param obs: observations, (batch, ...)
        :param action_masks: (batch, n) the masks
        :return: action distribution; values V and auxiliary values V_aux, both (batch,)
        """
        distribution, values, aux_values = super().evaluate_auxiliary(obs)
        if action_masks is not None:
            cast(Any, distribution).apply_masking(action_masks)
        return distribution, values, aux_values


class MaskablePPGCnnPolicy(MaskablePPGPolicy, MaskableActorCriticCnnPolicy):
    """:class:`MaskablePPGPolicy` with SB3's ``NatureCNN`` as default features extractor."""


class MaskablePPGMultiInputPolicy(MaskablePPGPolicy, MaskableMultiInputActorCriticPolicy):
    """:class:`MaskablePPGPolicy` for dictionary observations, with SB3's ``CombinedExtractor``."""


class RecurrentHeadMixin(AuxiliaryHeadMixin, RecurrentActorCriticPolicy):
    """
    Gives a recurrent policy the auxiliary value head. Place it first. What policy and critic share is said by
    sb3-contrib's parameters; by default, nothing.

    :param observation_space: as in ``RecurrentActorCriticPolicy``
    :param action_space: as in ``RecurrentActorCriticPolicy``
    :param lr_schedule: as in ``RecurrentActorCriticPolicy``
    :param net_arch: as in ``RecurrentActorCriticPolicy``
    :param share_features_extractor: ``None``: as ``shared_lstm``
    :param shared_lstm: whether the critic reads the policy's LSTM, which the value loss then does not train
    :param enable_critic_lstm: whether the critic has an LSTM of its own; ``None``: unless ``shared_lstm``
    :param kwargs: keyword arguments of the policy this is mixed into
    :raises ValueError: if the three contradict each other
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        *,
        share_features_extractor: bool | None = None,
        shared_lstm: bool = False,
        enable_critic_lstm: bool | None = None,
        **kwargs: Any,
    ) -> None:
        shares = shared_lstm if share_features_extractor is None else share_features_extractor
        has_own = not shared_lstm if enable_critic_lstm is None else enable_critic_lstm
        if shared_lstm and (has_own or not shares):
            raise ValueError(
                "shared_lstm=True needs enable_critic_lstm=False and share_features_extractor=True, got "
                f"enable_critic_lstm={enable_critic_lstm} and share_features_extractor={share_features_extractor}"
            )
        given: dict[str, Any] = {"shared_lstm": shared_lstm, "enable_critic_lstm": has_own}
        given["share_features_extractor"] = shares
        super().__init__(observation_space, action_space, lr_schedule, net_arch, **given, **kwargs)

    def make_features_extractor(self) -> BaseFeaturesExtractor:
        """
        :return: a new features extractor
        """
        return _with_integer_dimension(super().make_features_extractor())

    def evaluate_auxiliary(  # type: ignore[override]  # states, as in the policy's other methods
        self, obs: PyTorchObs, lstm_states: RNNStates, episode_starts: th.Tensor, action_masks: Any = None
    ) -> AuxiliaryOutputs:
        """
        :param obs: observations of sequences of one length, one after the other, (batch, ...)
        :param lstm_states: hidden and cell states of actor and critic that sequences begin with
        :param episode_starts: (batch,) whether observations begin episodes
        :param action_masks: (batch, n) the masks, of a policy that takes them
        :return: action distribution; values V and auxiliary values V_aux, both (batch,)
        """
        features: Any = self.extract_features(obs)
        actor_states, critic_states = cast(Any, lstm_states)
        pi_features, vf_features = (features, features) if self.share_features_extractor else features
        latent_pi, _ = self._process_sequence(pi_features, actor_states, episode_starts, self.lstm_actor)
        if self.lstm_critic is not None:
            latent_vf, _ = self._process_sequence(vf_features, critic_states, episode_starts, self.lstm_critic)
        else:
            latent_vf = latent_pi.detach() if self.shared_lstm else cast(Any, self.critic)(vf_features)
        extractor = self.mlp_extractor
        with self.masked(action_masks) if isinstance(self, MaskedRecurrentMixin) else contextlib.nullcontext():
            return self._auxiliary_outputs(extractor.forward_actor(latent_pi), extractor.forward_critic(latent_vf))

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), **_lstm_parameters(self)}


class RecurrentPPGPolicy(RecurrentHeadMixin, RecurrentActorCriticPolicy):
    """sb3-contrib's ``RecurrentActorCriticPolicy`` with the auxiliary value head."""


class RecurrentPPGCnnPolicy(RecurrentHeadMixin, RecurrentActorCriticCnnPolicy):
    """sb3-contrib's ``RecurrentActorCriticCnnPolicy`` with the auxiliary value head."""


class RecurrentPPGMultiInputPolicy(RecurrentHeadMixin, RecurrentMultiInputActorCriticPolicy):
    """sb3-contrib's ``RecurrentMultiInputActorCriticPolicy`` with the auxiliary value head."""


class MaskedRecurrentPPGPolicy(RecurrentHeadMixin, MaskedLstmPolicy):
    """:class:`MaskedLstmPolicy` with the auxiliary value head."""


class MaskedRecurrentPPGCnnPolicy(RecurrentHeadMixin, MaskedCnnLstmPolicy):
    """:class:`MaskedCnnLstmPolicy` with the auxiliary value head."""


class MaskedRecurrentPPGMultiInputPolicy(RecurrentHeadMixin, MaskedMultiInputLstmPolicy):
    """:class:`MaskedMultiInputLstmPolicy` with the auxiliary value head."""
