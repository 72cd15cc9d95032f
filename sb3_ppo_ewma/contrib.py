"""PPO-EWMA for sb3-contrib's RecurrentPPO and MaskablePPO, through the same mixin."""

from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar, cast

import torch as th
from sb3_contrib import MaskablePPO, RecurrentPPO
from sb3_contrib.common.maskable.buffers import (
    MaskableDictRolloutBuffer,
    MaskableDictRolloutBufferSamples,
    MaskableRolloutBuffer,
    MaskableRolloutBufferSamples,
)
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.common.utils import obs_as_tensor

from sb3_ppo_ewma._engine.recognition import hooks, replaced_in, replaced_method
from sb3_ppo_ewma.evaluation import PolicyEvaluation
from sb3_ppo_ewma.ppo_ewma import EwmaMixin
from sb3_ppo_ewma.rollouts import Rollout, observations_at

SelfMaskable = TypeVar("SelfMaskable", bound="MaskablePPOEWMA")


class LstmState:
    """
    Saves the hidden states between two rollouts, which sb3-contrib drops, with the interface of a module's state.

    :param model: whose ``_last_lstm_states`` they are
    """

    def __init__(self, model: "RecurrentPPOEWMA") -> None:
        self._model = model

    def state_dict(self) -> dict[str, th.Tensor]:
        """
        :return: the four tensors (hidden and cell state of actor and critic)
        """
        states = cast(RNNStates, self._model._last_lstm_states)
        tensors = [*states.pi, *states.vf]
        return {name: tensor.detach().clone() for name, tensor in zip(self._names, tensors, strict=True)}

    def load_state_dict(self, state_dict: dict[str, th.Tensor], strict: bool = True) -> None:
        """
        States of another number of environments are ignored: they start from zero, as in sb3-contrib.

        :param state_dict: from :meth:`state_dict`
        :param strict: not used, part of the interface of ``torch.nn.Module``
        """
        tensors = [state_dict[name].to(self._model.device) for name in self._names]
        if tensors[0].shape[1] == self._model.n_envs:
            states = RNNStates((tensors[0], tensors[1]), (tensors[2], tensors[3]))
            self._model._last_lstm_states = states  # type: ignore[assignment]  # sb3-contrib infers None

    _names: ClassVar[tuple[str, ...]] = ("hidden_pi", "cell_pi", "hidden_vf", "cell_vf")


class RecurrentEvaluation(PolicyEvaluation):
    """The evaluation of ``RecurrentPPO``: sequences, from the hidden states stored at collection."""

    def evaluate_actions(
        self, policy: Any, samples: Any, actions: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        result = policy.evaluate_actions(samples.observations, actions, samples.lstm_states, samples.episode_starts)
        return cast(tuple[th.Tensor, th.Tensor, th.Tensor | None], result)

    def log_prob(self, policy: Any, samples: Any, actions: th.Tensor) -> th.Tensor:
        if _evaluates_in_its_own_way(policy, RecurrentActorCriticPolicy):
            return super().log_prob(policy, samples, actions)
        distribution, _ = policy.get_distribution(samples.observations, samples.lstm_states.pi, samples.episode_starts)
        return cast(th.Tensor, distribution.log_prob(actions))

    def padding_mask(self, samples: Any) -> th.Tensor | None:
        return cast(th.Tensor, samples.mask > 1e-8)

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
        # On the CPU, as the buffer's arrays are, so that a queue saved on one device can be read on another
        states = tuple(state.cpu() for state in cast(RNNStates, model._last_lstm_states).vf)
        return Rollout(model.rollout_buffer, model._last_obs, model._last_episode_starts, states)


class MaskableEvaluation(PolicyEvaluation):
    """The evaluation of ``MaskablePPO``: distributions with invalid actions masked."""

    def evaluate_actions(
        self, policy: Any, samples: Any, actions: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        result = policy.evaluate_actions(samples.observations, actions, action_masks=samples.action_masks)
        return cast(tuple[th.Tensor, th.Tensor, th.Tensor | None], result)

    def log_prob(self, policy: Any, samples: Any, actions: th.Tensor) -> th.Tensor:
        if _evaluates_in_its_own_way(policy, MaskableActorCriticPolicy):
            return super().log_prob(policy, samples, actions)
        distribution = policy.get_distribution(samples.observations, action_masks=samples.action_masks)
        return cast(th.Tensor, distribution.log_prob(actions))


def _evaluates_in_its_own_way(policy: Any, sb3s: type[Any]) -> bool:
    """
    :param policy: any policy
    :param sb3s: the class of sb3-contrib it derives from
    :return: whether its log-probabilities may be others than those of ``get_distribution``
    """
    names = ("evaluate_actions", "extract_features", "get_distribution", "_get_action_dist_from_latent")
    cls = type(policy)
    is_changed = any(getattr(cls, name, None) is not getattr(sb3s, name) for name in names)
    return (
        is_changed
        or replaced_method(policy) is not None
        or (replaced_in([policy.mlp_extractor]) or hooks([policy.mlp_extractor])) is not None
    )


class RecurrentPPOEWMA(EwmaMixin, RecurrentPPO):
    """
    PPO-EWMA with LSTM policies: all parameters of ``sb3_contrib.RecurrentPPO`` in the same order with the same
    defaults; those of :class:`~sb3_ppo_ewma.EwmaMixin` by keyword.

    Current and proximal policy start each sequence from the hidden states stored at collection.
    """

    _own_states: ClassVar[tuple[str, ...]] = (*EwmaMixin._own_states, "lstm_state")
    policy_evaluation: ClassVar[PolicyEvaluation] = RecurrentEvaluation()
    _silent_states: ClassVar[frozenset[str]] = EwmaMixin._silent_states | {"lstm_state"}

    def _setup_model(self) -> None:
        super()._setup_model()
        self.lstm_state = LstmState(self)


class MaskablePPOEWMA(EwmaMixin, MaskablePPO):
    """
    PPO-EWMA with invalid-action masks: all parameters of ``sb3_contrib.MaskablePPO`` in the same order with the same
    defaults; those of :class:`~sb3_ppo_ewma.EwmaMixin` by keyword.
    """

    policy_evaluation: ClassVar[PolicyEvaluation] = MaskableEvaluation()
    samples_classes: ClassVar[Mapping[type[RolloutBuffer], type[Any]]] = {
        MaskableRolloutBuffer: MaskableRolloutBufferSamples,
        MaskableDictRolloutBuffer: MaskableDictRolloutBufferSamples,
    }

    def learn(  # type: ignore[override]  # as in MaskablePPO, use_masking stands before progress_bar
        self: SelfMaskable,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        use_masking: bool = True,
        progress_bar: bool = False,
    ) -> SelfMaskable:
        """
        Train, as ``MaskablePPO.learn``.

        :param total_timesteps: number of environment steps
        :param callback: called at every step
        :param log_interval: iterations between logs
        :param tb_log_name: name of the run for tensorboard; ``None``: that of the class
        :param reset_num_timesteps: whether to count steps from 0
        :param use_masking: whether to use invalid-action masks
        :param progress_bar: show a progress bar
        :return: the model
        """
        return super().learn(
            total_timesteps,
            callback,
            log_interval,
            tb_log_name,
            reset_num_timesteps,
            progress_bar,
            use_masking=use_masking,
        )
