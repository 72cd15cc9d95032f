"""
PPO-EWMA, PPG and PPG-EWMA for sb3-contrib's families, through the same mixins: recurrent policies, invalid-action
masks, and both.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar, cast

import numpy as np
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
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import MaybeCallback

from sb3_ppo_ewma._arguments import warn_caller
from sb3_ppo_ewma.contrib import policies
from sb3_ppo_ewma.contrib.evaluation import MaskableEvaluation, MaskableRecurrentEvaluation, RecurrentEvaluation
from sb3_ppo_ewma.contrib.masking import MaskableCollection, checked_masks
from sb3_ppo_ewma.evaluation import PolicyEvaluation
from sb3_ppo_ewma.ppg import AuxiliaryPhaseMixin, EwmaDefaultMixin
from sb3_ppo_ewma.ppo_ewma import EwmaMixin

SelfMaskable = TypeVar("SelfMaskable", bound="MaskableMixin")

# === What the families add to the core ===


class LstmState:
    """
    Saves the hidden states between two rollouts, which sb3-contrib drops, with the interface of a module's state.

    :param model: whose ``_last_lstm_states`` they are
    """

    def __init__(self, model: Any) -> None:
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
        :raises ValueError: if one is missing or has another shape
        """
        present = self.state_dict()
        shapes = {name: tuple(getattr(state_dict.get(name), "shape", ())) for name in present}
        n_envs = shapes["hidden_pi"][1:2]
        expected = {name: (*each.shape[:1], *n_envs, *each.shape[2:]) for name, each in present.items()}
        if shapes != expected:
            raise ValueError(f"the loaded states of the LSTM have the shapes {shapes}, expected {expected}")
        tensors = [state_dict[name].to(self._model.device) for name in self._names]
        if n_envs == (self._model.n_envs,):
            self._model._last_lstm_states = RNNStates((tensors[0], tensors[1]), (tensors[2], tensors[3]))

    _names: ClassVar[tuple[str, ...]] = ("hidden_pi", "cell_pi", "hidden_vf", "cell_vf")


class RecurrentMixin(EwmaMixin):
    """What an algorithm with LSTM policies adds. Place it first."""

    _own_states: ClassVar[tuple[str, ...]] = ("lstm_state",)
    _silent_states: ClassVar[frozenset[str]] = EwmaMixin._silent_states | {"lstm_state"}
    policy_evaluation: ClassVar[PolicyEvaluation] = RecurrentEvaluation()

    @classmethod
    def _needed_policies(cls) -> dict[type, str]:
        return {RecurrentActorCriticPolicy: "which has an LSTM", **super()._needed_policies()}

    def _setup_model(self) -> None:
        super()._setup_model()
        self.lstm_state = LstmState(self)


class MaskableMixin(EwmaMixin):
    """What an algorithm with action masks adds. Place it first."""

    policy_evaluation: ClassVar[PolicyEvaluation] = MaskableEvaluation()
    _has_masks: ClassVar[bool] = True
    _policy_with_masks: ClassVar[type] = MaskableActorCriticPolicy
    samples_classes: ClassVar[Mapping[type[RolloutBuffer], type[Any]]] = {
        MaskableRolloutBuffer: MaskableRolloutBufferSamples,
        MaskableDictRolloutBuffer: MaskableDictRolloutBufferSamples,
    }

    @classmethod
    def _needed_policies(cls) -> dict[type, str]:
        return {cls._policy_with_masks: "which takes action masks", **super()._needed_policies()}

    def learn(  # type: ignore[override]  # as in MaskablePPO, use_masking stands before progress_bar
        self: SelfMaskable,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int | None = 1,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        use_masking: bool = True,
        progress_bar: bool = False,
    ) -> SelfMaskable:
        """
        Train, as ``MaskablePPO.learn``.

        :param total_timesteps: number of environment steps
        :param callback: called at every step
        :param log_interval: iterations between logs; ``None``: no logs
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

    def predict(
        self,
        observation: Any,
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        action_masks: np.ndarray | None = None,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """
        As ``MaskablePPO.predict``, for a recurrent policy also with its state.

        :param observation: observations
        :param state: state of the policy, ``None``: zero
        :param episode_start: (n_envs,) whether observations begin episodes
        :param deterministic: take the most likely actions
        :param action_masks: (n_envs, n) True for valid actions; ``None``: all are valid
        :return: actions, new state
        :raises ValueError: if no action is valid in one of the environments
        """
        if action_masks is not None:
            checked_masks(action_masks, self.action_space, lambda index: f"environment {index}")
        policy: Any = self.policy
        result = policy.predict(observation, state, episode_start, deterministic, action_masks=action_masks)
        return cast(tuple[np.ndarray, tuple[np.ndarray, ...] | None], result)


class MaskableRecurrentMixin(MaskableMixin, RecurrentMixin):
    """What an algorithm with LSTM policies and action masks adds. Place it first, before ``MaskableCollection``."""

    policy_evaluation: ClassVar[PolicyEvaluation] = MaskableRecurrentEvaluation()
    _policy_with_masks: ClassVar[type] = policies.MaskablePolicyMixin

    def to_ppo(self) -> OnPolicyAlgorithm:
        """
        As in :class:`~sb3_ppo_ewma.EwmaMixin`.

        :return: ``RecurrentPPO``, which takes no action masks, with a warning; its policy's ``predict`` does
        """
        warn_caller("RecurrentPPO takes no action masks: it collects and trains without them")
        return super().to_ppo()

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_use_masking"]


# === PPO-EWMA ===


class RecurrentPPOEWMA(RecurrentMixin, RecurrentPPO):
    """
    PPO-EWMA with LSTM policies: all parameters of ``sb3_contrib.RecurrentPPO`` in the same order with the same
    defaults; those of :class:`~sb3_ppo_ewma.EwmaMixin` by keyword.

    Current and proximal policy start each sequence from the hidden states stored at collection.
    """


class MaskablePPOEWMA(MaskableMixin, MaskablePPO):
    """
    PPO-EWMA with invalid-action masks: all parameters of ``sb3_contrib.MaskablePPO`` in the same order with the same
    defaults; those of :class:`~sb3_ppo_ewma.EwmaMixin` by keyword.
    """


class MaskableRecurrentPPOEWMA(MaskableRecurrentMixin, MaskableCollection, RecurrentPPO):  # type: ignore[misc]  # learn()
    """
    PPO-EWMA with LSTM policies and invalid-action masks: all parameters of ``sb3_contrib.RecurrentPPO`` in the same
    order with the same defaults; those of :class:`~sb3_ppo_ewma.EwmaMixin` by keyword. Environments have a method
    ``action_masks()``, as for ``MaskablePPO``; ``predict`` takes masks and states.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpLstmPolicy": policies.MaskableRecurrentActorCriticPolicy,
        "CnnLstmPolicy": policies.MaskableRecurrentActorCriticCnnPolicy,
        "MultiInputLstmPolicy": policies.MaskableRecurrentMultiInputActorCriticPolicy,
    }


# === PPG ===


class RecurrentPPG(RecurrentMixin, AuxiliaryPhaseMixin, RecurrentPPO):
    """
    PPG with LSTM policies: all parameters of ``sb3_contrib.RecurrentPPO`` in the same order; those of
    :class:`~sb3_ppo_ewma.AuxiliaryPhaseMixin` and :class:`~sb3_ppo_ewma.EwmaMixin` by keyword, with the defaults of
    :class:`~sb3_ppo_ewma.PPG`.

    The auxiliary phase trains on whole sequences, all steps of an environment in a rollout, from the states they began
    with; ``aux_batch_size`` is rounded down to a number of them, at least one.
    """

    _head: ClassVar[type] = policies.RecurrentHeadMixin
    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpLstmPolicy": policies.RecurrentPPGPolicy,
        "CnnLstmPolicy": policies.RecurrentPPGCnnPolicy,
        "MultiInputLstmPolicy": policies.RecurrentPPGMultiInputPolicy,
    }


class MaskablePPG(MaskableMixin, AuxiliaryPhaseMixin, MaskablePPO):
    """
    PPG with invalid-action masks: all parameters of ``sb3_contrib.MaskablePPO`` in the same order; those of
    :class:`~sb3_ppo_ewma.AuxiliaryPhaseMixin` and :class:`~sb3_ppo_ewma.EwmaMixin` by keyword, with the defaults of
    :class:`~sb3_ppo_ewma.PPG`.
    """

    _head: ClassVar[type] = policies.MaskablePPGPolicy
    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": policies.MaskablePPGPolicy,
        "CnnPolicy": policies.MaskablePPGCnnPolicy,
        "MultiInputPolicy": policies.MaskablePPGMultiInputPolicy,
    }


class MaskableRecurrentPPG(MaskableRecurrentMixin, AuxiliaryPhaseMixin, MaskableCollection, RecurrentPPO):  # type: ignore[misc]  # learn()
    """PPG with LSTM policies and invalid-action masks: :class:`RecurrentPPG` and :class:`MaskablePPG` in one."""

    _head: ClassVar[type] = policies.RecurrentHeadMixin
    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpLstmPolicy": policies.MaskableRecurrentPPGPolicy,
        "CnnLstmPolicy": policies.MaskableRecurrentPPGCnnPolicy,
        "MultiInputLstmPolicy": policies.MaskableRecurrentPPGMultiInputPolicy,
    }


# === PPG-EWMA ===


class RecurrentPPGEWMA(EwmaDefaultMixin, RecurrentPPG):
    """:class:`RecurrentPPG` whose proximal policy is a moving average, as :class:`~sb3_ppo_ewma.PPGEWMA`."""


class MaskablePPGEWMA(EwmaDefaultMixin, MaskablePPG):
    """:class:`MaskablePPG` whose proximal policy is a moving average, as :class:`~sb3_ppo_ewma.PPGEWMA`."""


class MaskableRecurrentPPGEWMA(EwmaDefaultMixin, MaskableRecurrentPPG):  # type: ignore[misc]  # learn()
    """:class:`MaskableRecurrentPPG` whose proximal policy is a moving average, as :class:`~sb3_ppo_ewma.PPGEWMA`."""
