"""
Recurrent policies without padding and without a loop over time: sequences are cut where episodes begin, so that an LSTM
is called once for all those of about one length.
"""

from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import torch as th
from stable_baselines3.common.policies import BasePolicy
from torch import nn

from sb3_ppo_ewma._engine.fused import FusedEngine
from sb3_ppo_ewma._engine.iteration import Iteration
from sb3_ppo_ewma._engine.recognition import hooks, unknown_lstm, unknown_module
from sb3_ppo_ewma.evaluation import PolicyEvaluation
from sb3_ppo_ewma.rollouts import LSTM_STATES, PhaseSamples, Rollout, flatten_buffer, warn_too_large

_MASKS = "action_masks"


class _Group(NamedTuple):
    """
    Sequences of about one length, padded to the longest of them.

    :param sequences: (n,) their numbers
    :param samples: (length · n,) numbers of their samples, time by time; padding repeats the first
    :param shape: length, n
    """

    sequences: th.Tensor
    samples: th.Tensor
    shape: tuple[int, int]


class Sequences:
    """
    The sequences of a minibatch.

    :param starts: (n_sequences,) numbers of the samples that they begin with, from 0 upwards
    :param n_samples: number of samples
    :param device: of the policy
    """

    def __init__(self, starts: np.ndarray, n_samples: int, device: th.device) -> None:
        lengths = np.diff(starts, append=n_samples)
        order = np.argsort(-lengths, kind="stable")
        positions = np.empty(n_samples, np.int64)
        self._groups: list[_Group] = []
        begin = offset = 0
        while begin < len(order):
            longest = lengths[order[begin]]
            # At most half of a sequence is padding.
            end = begin + int(np.searchsorted(-lengths[order[begin:]], -longest // 2, side="right"))
            chosen = order[begin:end]
            times = np.arange(longest)[:, None]
            is_real = times < lengths[chosen]
            samples = np.where(is_real, starts[chosen] + times, starts[chosen])
            positions[samples[is_real]] = offset + np.flatnonzero(is_real)
            numbers = th.as_tensor(chosen, device=device), th.as_tensor(samples.ravel(), device=device)
            self._groups.append(_Group(*numbers, shape=(int(longest), len(chosen))))
            begin, offset = end, offset + samples.size
        self._positions = th.as_tensor(positions, device=device)

    def outputs(self, lstm: nn.LSTM, features: th.Tensor, states: tuple[th.Tensor, th.Tensor]) -> th.Tensor:
        """
        :param lstm: the LSTM
        :param features: (n_samples, lstm.input_size)
        :param states: hidden and cell states that the sequences begin with, (layers, n_sequences, units) each
        :return: (n_samples, units) its outputs
        """
        parts = []
        for sequences, samples, shape in self._groups:
            inputs = features.index_select(0, samples).view(*shape, -1)
            outputs, _ = lstm(inputs, tuple(state.index_select(1, sequences) for state in states))
            parts.append(outputs.flatten(end_dim=1))
        joined = parts[0] if len(parts) == 1 else th.cat(parts)
        return joined.index_select(0, self._positions)


class SequenceSamples(NamedTuple):
    """
    A minibatch of sequences without padding.

    :param observations: tensor or dictionary of tensors, (batch, ...) each
    :param actions: (batch, ...)
    :param old_values: (batch,)
    :param old_log_prob: (batch,)
    :param advantages: (batch,)
    :param returns: (batch,)
    :param sequences: the sequences
    :param states: ``LSTM_STATES`` that they begin with, (layers, n_sequences, units) each
    :param action_masks: (batch, n), ``None`` without masks
    """

    observations: Any
    actions: th.Tensor
    old_values: th.Tensor
    old_log_prob: th.Tensor
    advantages: th.Tensor
    returns: th.Tensor
    sequences: Sequences
    states: list[th.Tensor]
    action_masks: th.Tensor | None


class SequenceMinibatches:
    """
    The minibatches of sb3-contrib's recurrent buffers, with the same samples in the same order.

    :param buffer: filled rollout buffer, it is flattened
    """

    def __init__(self, buffer: Any) -> None:
        if not buffer.generator_ready:
            for name in LSTM_STATES:
                setattr(buffer, name, getattr(buffer, name).swapaxes(1, 2))
        has_masks = hasattr(buffer, _MASKS)
        flatten_buffer(buffer, (*LSTM_STATES, "episode_starts", *([_MASKS] if has_masks else [])))
        self.buffer = buffer
        observations = buffer.observations
        self._observations: Any = (
            {key: self._tensor(array) for key, array in observations.items()}
            if isinstance(observations, dict)
            else self._tensor(observations)
        )
        self._actions = self._tensor(buffer.actions)
        self._masks = self._tensor(buffer.action_masks) if has_masks else None
        self.update_targets()

    def _tensor(self, array: np.ndarray) -> th.Tensor:
        return th.as_tensor(array, device=self.buffer.device)

    def update_targets(self) -> None:
        """Read values, log-probabilities, advantages and returns from the buffer again."""
        buffer = self.buffer
        targets = (buffer.values, buffer.log_probs, buffer.advantages, buffer.returns)
        self._targets = self._tensor(np.stack([target.flatten() for target in targets]))

    def minibatches(self, batch_size: int | None) -> Iterator[SequenceSamples]:
        """
        :param batch_size: number of samples, ``None``: all; the last minibatch may be smaller
        :return: one epoch
        """
        n_samples = self._targets.shape[1]
        split = np.random.randint(n_samples)  # SB3's generator, as the buffer draws
        indices = np.roll(np.arange(n_samples), -split)
        for start in range(0, n_samples, batch_size or n_samples):
            yield self._gather(indices[start : start + (batch_size or n_samples)])

    def _gather(self, indices: np.ndarray) -> SequenceSamples:
        buffer = self.buffer
        begins_episode = buffer.episode_starts[indices].ravel() != 0
        is_start = begins_episode | (indices % buffer.buffer_size == 0)
        is_start[0] = True
        starts = np.flatnonzero(is_start)
        kept = ~begins_episode[starts][None, :, None]  # an episode begins with zero
        states = [getattr(buffer, name)[indices[starts]].swapaxes(0, 1) * kept for name in LSTM_STATES]
        chosen = self._tensor(indices)
        observations = self._observations
        values, log_probs, advantages, returns = self._targets.index_select(1, chosen).unbind()
        return SequenceSamples(
            {key: tensor.index_select(0, chosen) for key, tensor in observations.items()}
            if isinstance(observations, dict)
            else observations.index_select(0, chosen),
            self._actions.index_select(0, chosen),
            values,
            log_probs,
            advantages,
            returns,
            Sequences(starts, len(indices), buffer.device),
            [self._tensor(state) for state in states],
            None if self._masks is None else self._masks.index_select(0, chosen),
        )


class SequenceEvaluation(PolicyEvaluation):
    """
    The evaluation of recurrent policies that compute what sb3-contrib's do.

    :param family: how the reference evaluates them
    """

    def __init__(self, family: PolicyEvaluation) -> None:
        self._family = family

    def evaluate_actions(
        self, policy: Any, samples: SequenceSamples, actions: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        latent_pi, latent_vf = self._latents(policy, samples.observations, samples.sequences, samples.states)
        distribution = _distribution(policy, latent_pi, samples.action_masks)
        log_prob = distribution.log_prob(actions)
        return policy.value_net(latent_vf), log_prob, distribution.entropy()

    def log_prob(self, policy: Any, samples: SequenceSamples, actions: th.Tensor) -> th.Tensor:
        latent_pi = self._latent_pi(policy, samples.observations, samples.sequences, samples.states)
        return cast(th.Tensor, _distribution(policy, latent_pi, samples.action_masks).log_prob(actions))

    def distribution(self, policy: Any, samples: PhaseSamples) -> Any:
        latent_pi = self._latent_pi(policy, samples.observations, *_cut(samples))
        return _distribution(policy, latent_pi, samples.further.get(_MASKS))

    def evaluate_auxiliary(self, policy: Any, samples: PhaseSamples) -> tuple[Any, th.Tensor, th.Tensor]:
        latent_pi, latent_vf = self._latents(policy, samples.observations, *_cut(samples))
        values, aux_values = policy.value_net(latent_vf), policy.aux_value_net(latent_pi)
        distribution = _distribution(policy, latent_pi, samples.further.get(_MASKS))
        return distribution, values.flatten(), aux_values.flatten()

    def predict_values(self, policy: Any, buffer: Any, indices: slice) -> th.Tensor:
        return self._family.predict_values(policy, buffer, indices)

    def predict_last_values(self, policy: Any, rollout: Rollout) -> th.Tensor:
        return self._family.predict_last_values(policy, rollout)

    @staticmethod
    def _latent_pi(policy: Any, observations: Any, sequences: Sequences, states: list[th.Tensor]) -> th.Tensor:
        features = BasePolicy.extract_features(policy, observations, policy.pi_features_extractor)
        latent = sequences.outputs(policy.lstm_actor, features, (states[0], states[1]))
        return cast(th.Tensor, policy.mlp_extractor.forward_actor(latent))

    @staticmethod
    def _latents(
        policy: Any, observations: Any, sequences: Sequences, states: list[th.Tensor]
    ) -> tuple[th.Tensor, th.Tensor]:
        features = policy.extract_features(observations)
        pi_features, vf_features = (features, features) if policy.share_features_extractor else features
        latent_pi = sequences.outputs(policy.lstm_actor, pi_features, (states[0], states[1]))
        if policy.lstm_critic is not None:
            latent_vf = sequences.outputs(policy.lstm_critic, vf_features, (states[2], states[3]))
        else:
            latent_vf = latent_pi.detach() if policy.shared_lstm else policy.critic(vf_features)
        return policy.mlp_extractor.forward_actor(latent_pi), policy.mlp_extractor.forward_critic(latent_vf)


class SequenceEngine(FusedEngine):
    """
    The fused engine for recurrent policies that :func:`unknown_recurrent` accepts.

    :param iteration: what the training works with
    """

    name: ClassVar[str] = "sequences"

    def __init__(self, iteration: Iteration) -> None:
        super().__init__(iteration)
        try:
            if iteration.source is not None:
                iteration.source = SequenceMinibatches(cast(Any, iteration.source).buffer)
            iteration.evaluation = SequenceEvaluation(iteration.evaluation)
        except th.OutOfMemoryError:
            warn_too_large(cast(Any, iteration.source).buffer)  # it goes on as the fused engine


def unknown_recurrent(policy: Any) -> str | None:
    """
    :param policy: a policy of sb3-contrib's recurrent family that overrides none of its methods
    :return: why its LSTM cannot be called for whole sequences, ``None`` if it can
    """
    lstms = [lstm for lstm in (policy.lstm_actor, policy.lstm_critic) if lstm is not None]
    for lstm in lstms:
        reason = unknown_lstm(lstm)
        if reason is not None:
            return reason
    others = [module for module in policy.modules() if module is not policy and module not in lstms]
    return unknown_module(others) or hooks(policy.modules())


def _distribution(policy: Any, latent_pi: th.Tensor, action_masks: th.Tensor | None) -> Any:
    """
    :param policy: the policy
    :param latent_pi: (batch, units) output of the policy network
    :param action_masks: (batch, n), ``None`` without masks
    :return: SB3's action distribution
    """
    if action_masks is None:
        return policy._get_action_dist_from_latent(latent_pi)
    with policy.masked(action_masks):
        return policy._get_action_dist_from_latent(latent_pi)


def _cut(samples: PhaseSamples) -> tuple[Sequences, list[th.Tensor]]:
    """
    :param samples: samples of an auxiliary phase, in whole sequences
    :return: the sequences, cut where episodes begin; the states that they begin with
    """
    begins_episode = cast(th.Tensor, samples.episode_starts).flatten().cpu().numpy() != 0
    n_samples, n_whole = len(begins_episode), samples.lstm_states[0].shape[1]
    is_start = begins_episode.copy()
    is_start[:: n_samples // n_whole] = True
    starts = np.flatnonzero(is_start)
    device = samples.returns.device
    whole = th.as_tensor(starts // (n_samples // n_whole), device=device)
    kept = th.as_tensor(~begins_episode[starts], device=device)[None, :, None]
    return Sequences(starts, n_samples, device), [state.index_select(1, whole) * kept for state in samples.lstm_states]
