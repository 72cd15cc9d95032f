"""How policies of sb3-contrib's families are evaluated: with masks, with the states of an LSTM, with both."""

from typing import Any, ClassVar, cast

import torch as th
from sb3_contrib.common.maskable.distributions import (
    MaskableBernoulliDistribution,
    MaskableCategoricalDistribution,
    MaskableMultiCategoricalDistribution,
)
from sb3_contrib.common.maskable.policies import (
    MaskableActorCriticCnnPolicy,
    MaskableActorCriticPolicy,
    MaskableMultiInputActorCriticPolicy,
)
from sb3_contrib.common.recurrent import buffers as recurrent_buffers
from sb3_contrib.common.recurrent.buffers import RecurrentDictRolloutBuffer, RecurrentRolloutBuffer
from sb3_contrib.common.recurrent.policies import (
    RecurrentActorCriticCnnPolicy,
    RecurrentActorCriticPolicy,
    RecurrentMultiInputActorCriticPolicy,
)
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3.common.utils import obs_as_tensor
from torch import nn

from sb3_ppo_ewma._engine.recognition import (
    FILLED_BY_SB3,
    hooks,
    overridden_method,
    patched_classes,
    rely_on,
    replaced_in,
    replaced_method,
    unknown_extractors,
    unknown_module,
)
from sb3_ppo_ewma._engine.sequences import unknown_recurrent
from sb3_ppo_ewma.contrib import policies
from sb3_ppo_ewma.contrib.masking import (
    MaskedCategoricalDistribution,
    MaskedMultiCategoricalDistribution,
    MaskedRecurrentDictRolloutBuffer,
    MaskedRecurrentRolloutBuffer,
    checked_masks,
)
from sb3_ppo_ewma.distributions import SoftplusDiagGaussianDistribution
from sb3_ppo_ewma.evaluation import PolicyEvaluation
from sb3_ppo_ewma.rollouts import LSTM_STATES, Rollout, observations_at

# Policies whose code the faster engine knows
_RECURRENT = (
    *(policies.MaskedRecurrentPPGPolicy, policies.MaskedRecurrentPPGCnnPolicy),
    *(policies.MaskedRecurrentPPGMultiInputPolicy, policies.RecurrentPPGPolicy),
    *(policies.RecurrentPPGCnnPolicy, policies.RecurrentPPGMultiInputPolicy),
    *(policies.MaskedLstmPolicy, policies.MaskedCnnLstmPolicy, policies.MaskedMultiInputLstmPolicy),
    *(RecurrentActorCriticCnnPolicy, RecurrentMultiInputActorCriticPolicy, RecurrentActorCriticPolicy),
)
_MASKABLE = (
    *(policies.MaskablePPGCnnPolicy, policies.MaskablePPGMultiInputPolicy, policies.MaskablePPGPolicy),
    *(MaskableActorCriticCnnPolicy, MaskableMultiInputActorCriticPolicy, MaskableActorCriticPolicy),
)
_KNOWN = frozenset(base for policy in (*_RECURRENT, *_MASKABLE) for base in policy.__mro__)
_DISTRIBUTIONS = (
    *(*FILLED_BY_SB3, SoftplusDiagGaussianDistribution),
    *(MaskedCategoricalDistribution, MaskedMultiCategoricalDistribution, MaskableCategoricalDistribution),
    *(MaskableMultiCategoricalDistribution, MaskableBernoulliDistribution),
)
_BUFFERS = (
    *(RecurrentRolloutBuffer, RecurrentDictRolloutBuffer),
    *(MaskedRecurrentRolloutBuffer, MaskedRecurrentDictRolloutBuffer),
)
rely_on({*_KNOWN, nn.LSTM, recurrent_buffers, *(base for buffer in _BUFFERS for base in buffer.__mro__)})


class MaskableEvaluation(PolicyEvaluation):
    """The evaluation of ``MaskablePPO``: distributions with invalid actions masked."""

    step_fields: ClassVar[tuple[str, ...]] = ("action_masks",)

    def further_arguments(self, samples: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = super().further_arguments(samples)
        return args, {**kwargs, "action_masks": samples.action_masks}

    def log_prob(self, policy: Any, samples: Any, actions: th.Tensor) -> th.Tensor:
        return cast(th.Tensor, self.distribution(policy, samples).log_prob(actions))

    def distribution(self, policy: Any, samples: Any) -> Any:
        return policy.get_distribution(samples.observations, action_masks=samples.action_masks)

    def may_skip_critic(self, policy: Any) -> bool:
        return _is_ordinary(policy, _MASKABLE)

    def collected_rollout(self, model: Any) -> Rollout:
        # MaskablePPO's collection does not look at them.
        buffer = model.rollout_buffer
        checked_masks(
            buffer.action_masks,
            model.action_space,
            lambda index: f"environment {index % buffer.n_envs} at step {index // buffer.n_envs} of the rollout",
        )
        return super().collected_rollout(model)


class RecurrentEvaluation(PolicyEvaluation):
    """The evaluation of ``RecurrentPPO``: sequences, from the hidden states stored at collection."""

    step_fields: ClassVar[tuple[str, ...]] = ("episode_starts",)
    sequence_fields: ClassVar[tuple[str, ...]] = LSTM_STATES

    def further_arguments(self, samples: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        _, kwargs = super().further_arguments(samples)
        return (rnn_states(samples), samples.episode_starts.flatten()), kwargs

    def log_prob(self, policy: Any, samples: Any, actions: th.Tensor) -> th.Tensor:
        return cast(th.Tensor, self.distribution(policy, samples).log_prob(actions))

    def distribution(self, policy: Any, samples: Any) -> Any:
        (states, episode_starts), kwargs = self.further_arguments(samples)
        distribution, _ = policy.get_distribution(samples.observations, states.pi, episode_starts, **kwargs)
        return distribution

    def may_skip_critic(self, policy: Any) -> bool:
        return _is_ordinary(policy, _RECURRENT)

    def padding_mask(self, samples: Any) -> th.Tensor | None:
        return cast(th.Tensor, samples.mask > 1e-8)

    def unknown_sequences(self, policy: Any) -> str | None:
        if type(self) not in (RecurrentEvaluation, MaskableRecurrentEvaluation) or vars(self):
            return f"policies are evaluated by {type(self).__name__}"
        return _unknown_policy(policy, _RECURRENT) or unknown_recurrent(policy)

    def unknown_sequence_buffer(self, buffer: Any) -> str | None:
        if type(buffer) not in _BUFFERS:
            return f"the rollout buffer is a {type(buffer).__name__}"
        replaced = replaced_method(buffer)
        return None if replaced is None else f"{replaced} of the rollout buffer was replaced"

    def predict_values(self, policy: Any, buffer: Any, indices: slice) -> th.Tensor:
        # Every sample is a sequence of length one, from the hidden state stored before it: (samples, layers, units)
        states = [
            buffer.to_torch(states[indices].swapaxes(0, 1)).contiguous()
            for states in (buffer.hidden_states_vf, buffer.cell_states_vf)
        ]
        episode_starts = buffer.to_torch(buffer.episode_starts[indices]).flatten()
        values = policy.predict_values(observations_at(buffer, indices), tuple(states), episode_starts)
        return cast(th.Tensor, values)

    def predict_last_values(self, policy: Any, rollout: Rollout) -> th.Tensor:
        observations = obs_as_tensor(rollout.last_obs, policy.device)
        dones = th.as_tensor(rollout.last_dones, dtype=th.float32, device=policy.device)
        states = tuple(state.to(policy.device) for state in rollout.last_lstm_states)
        return cast(th.Tensor, policy.predict_values(observations, states, dones))

    def collected_rollout(self, model: Any) -> Rollout:
        rollout = super().collected_rollout(model)
        # On the CPU, as the buffer's arrays are, so that a queue saved on one device can be read on another
        states = tuple(state.cpu() for state in cast(RNNStates, model._last_lstm_states).vf)
        return Rollout(rollout.buffer, rollout.last_obs, rollout.last_dones, states)


class MaskableRecurrentEvaluation(MaskableEvaluation, RecurrentEvaluation):
    """Sequences of distributions with invalid actions masked."""

    step_fields: ClassVar[tuple[str, ...]] = (*MaskableEvaluation.step_fields, *RecurrentEvaluation.step_fields)

    def may_skip_critic(self, policy: Any) -> bool:
        return RecurrentEvaluation.may_skip_critic(self, policy)

    def distribution(self, policy: Any, samples: Any) -> Any:
        return RecurrentEvaluation.distribution(self, policy, samples)


def rnn_states(samples: Any) -> RNNStates:
    """
    :param samples: minibatch of a rollout buffer of sb3-contrib, or of an auxiliary phase
    :return: states that its sequences begin with
    """
    states = samples.lstm_states
    return states if isinstance(states, RNNStates) else RNNStates((states[0], states[1]), (states[2], states[3]))


def _unknown_policy(policy: Any, known_policies: tuple[Any, ...]) -> str | None:
    """
    :param policy: any policy
    :param known_policies: classes whose code is known, those derived from others first
    :return: what of it is not theirs, apart from its modules; ``None`` if all is
    """
    cls = type(policy)
    known = next((base for base in cls.__mro__ if base in known_policies), None)
    if known is None:
        return f"{cls.__name__} is not derived from {known_policies[-1].__name__}"
    if policy._compiled_call_impl is not None:
        return "the policy is compiled"
    replaced = replaced_method(policy)
    if replaced is not None:
        return f"{replaced} of the policy was replaced"
    distribution = policy.action_dist
    if type(distribution) not in _DISTRIBUTIONS or replaced_method(distribution) is not None:
        return f"the distribution is a {type(distribution).__name__}, or a method of it was replaced"
    return overridden_method(cls, known, _KNOWN) or unknown_extractors(policy)


def _is_ordinary(policy: Any, known_policies: tuple[Any, ...]) -> bool:
    """
    :param policy: any policy
    :param known_policies: classes whose code is known
    :return: whether nobody notices when its critic is not evaluated
    """
    lstms = [module for module in policy.modules() if type(module) is nn.LSTM]
    others = [module for module in policy.modules() if module is not policy and module not in lstms]
    unknown = patched_classes() or _unknown_policy(policy, known_policies) or unknown_module(others)
    return (unknown or replaced_in(lstms) or hooks(policy.modules())) is None
