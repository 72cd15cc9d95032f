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
from torch import nn

from sb3_ppo_ewma._engine.sequences import recurrent_latents
from sb3_ppo_ewma.contrib.masking import masked_distribution
from sb3_ppo_ewma.policies import AuxiliaryHeadMixin, CriticArchMixin

AuxiliaryOutputs = tuple[Distribution, th.Tensor, th.Tensor]

# === Recurrent ===


class CompleteRecurrentMixin(RecurrentActorCriticPolicy):
    """What sb3-contrib's recurrent policies lack: ``MultiDiscrete`` observations, and saving all parameters."""

    def make_features_extractor(self) -> BaseFeaturesExtractor:
        """
        :return: a new features extractor
        """
        extractor = super().make_features_extractor()
        # A MultiDiscrete space gives an integer of numpy, which an LSTM refuses.
        extractor._features_dim = int(extractor._features_dim)
        return extractor

    def _get_constructor_parameters(self) -> dict[str, Any]:
        own = {
            "lstm_hidden_size": self.lstm_output_dim,
            "n_lstm_layers": self.lstm_actor.num_layers,
            "shared_lstm": self.shared_lstm,
            "enable_critic_lstm": self.enable_critic_lstm,
            "lstm_kwargs": self.lstm_kwargs,
            "share_features_extractor": self.share_features_extractor,
        }
        return {**super()._get_constructor_parameters(), **own}


# === Masks, recurrent ===


class MaskablePolicyMixin(CompleteRecurrentMixin):
    """
    Gives a recurrent policy masks: its methods take ``action_masks``, (batch, n) True for valid values. Place it first.
    """

    _action_masks: Any = None

    def _build(self, lr_schedule: Schedule) -> None:
        self.action_dist = masked_distribution(self.action_space)
        super()._build(lr_schedule)

    @contextlib.contextmanager
    def masked(self, action_masks: Any) -> Iterator[None]:
        """
        Within this context, all distributions of the policy are masked.

        :param action_masks: (batch, n) the masks; ``None``: those of an enclosing context, or none
        """
        before = self._action_masks
        self._action_masks = before if action_masks is None else action_masks
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
        with self.masked(action_masks):
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


class MaskableRecurrentActorCriticPolicy(MaskablePolicyMixin, RecurrentActorCriticPolicy):
    """sb3-contrib's ``RecurrentActorCriticPolicy`` with masks."""


class MaskableRecurrentActorCriticCnnPolicy(MaskablePolicyMixin, RecurrentActorCriticCnnPolicy):
    """sb3-contrib's ``RecurrentActorCriticCnnPolicy`` with masks."""


class MaskableRecurrentMultiInputActorCriticPolicy(MaskablePolicyMixin, RecurrentMultiInputActorCriticPolicy):
    """sb3-contrib's ``RecurrentMultiInputActorCriticPolicy`` with masks."""


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


class RecurrentHeadMixin(AuxiliaryHeadMixin, CompleteRecurrentMixin):
    """
    Gives a recurrent policy the auxiliary value head. Place it first. sb3-contrib's parameters set what policy and
    critic share; by default, nothing.

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
        states = cast(Any, lstm_states)

        def outputs(lstm: nn.LSTM, features: th.Tensor, which: int) -> th.Tensor:
            return self._process_sequence(features, states[which], episode_starts, lstm)[0]

        latent_pi, latent_vf = recurrent_latents(self, obs, outputs)
        with self.masked(action_masks) if isinstance(self, MaskablePolicyMixin) else contextlib.nullcontext():
            return self._auxiliary_outputs(latent_pi, latent_vf)


class RecurrentPPGPolicy(RecurrentHeadMixin, RecurrentActorCriticPolicy):
    """sb3-contrib's ``RecurrentActorCriticPolicy`` with the auxiliary value head."""


class RecurrentPPGCnnPolicy(RecurrentHeadMixin, RecurrentActorCriticCnnPolicy):
    """sb3-contrib's ``RecurrentActorCriticCnnPolicy`` with the auxiliary value head."""


class RecurrentPPGMultiInputPolicy(RecurrentHeadMixin, RecurrentMultiInputActorCriticPolicy):
    """sb3-contrib's ``RecurrentMultiInputActorCriticPolicy`` with the auxiliary value head."""


class MaskableRecurrentPPGPolicy(RecurrentHeadMixin, MaskableRecurrentActorCriticPolicy):
    """:class:`MaskableRecurrentActorCriticPolicy` with the auxiliary value head."""


class MaskableRecurrentPPGCnnPolicy(RecurrentHeadMixin, MaskableRecurrentActorCriticCnnPolicy):
    """:class:`MaskableRecurrentActorCriticCnnPolicy` with the auxiliary value head."""


class MaskableRecurrentPPGMultiInputPolicy(RecurrentHeadMixin, MaskableRecurrentMultiInputActorCriticPolicy):
    """:class:`MaskableRecurrentMultiInputActorCriticPolicy` with the auxiliary value head."""
