"""Phasic Policy Gradient: an auxiliary phase as a mixin on the decoupled core, PPG and PPG-EWMA."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, cast

import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import MaybeCallback, Schedule
from stable_baselines3.common.utils import FloatSchedule, update_learning_rate

from sb3_ppo_ewma._arguments import check_schedule, scheduled_learning_rate, warn_caller
from sb3_ppo_ewma._engine.iteration import AuxiliaryCoefficients, make_iteration
from sb3_ppo_ewma._finite import naming_broken_tensors
from sb3_ppo_ewma.auxiliary_phase import AuxiliaryPhase, PhaseProgress
from sb3_ppo_ewma.following import make_optimizer
from sb3_ppo_ewma.policies import AuxiliaryHeadMixin, PPGCnnPolicy, PPGImpalaPolicy, PPGMultiInputPolicy, PPGPolicy
from sb3_ppo_ewma.ppo_ewma import EwmaMixin
from sb3_ppo_ewma.rollouts import PhaseBuffer, Rollout, default_aux_batch_size
from sb3_ppo_ewma.training_log import log_phase


class AuxiliaryPhaseMixin(EwmaMixin):
    """
    Adds the auxiliary phase of Phasic Policy Gradient to the decoupled core. After every ``n_policy_iterations``
    rollouts that were trained on, ``n_aux_epochs`` epochs over all of them minimise

        ½·c_aux·E[(V_aux − V_targ)²] + β_clone·E[KL(π_old ‖ π_θ)] + ½·c_vf·E[(V − V_targ)²]

    where π_old is the policy before the phase and V_targ are the value targets of the policy phase.

    Source: Cobbe, Hilton, Klimov, Schulman 2020, https://arxiv.org/abs/2009.04416

    :param n_policy_iterations: N_π ≥ 1, rollouts of a policy phase
    :param n_aux_epochs: E_aux ≥ 0, epochs of an auxiliary phase; 0: no auxiliary phases, nothing is stored for them
    :param aux_batch_size: samples in a minibatch of the auxiliary phase; ``None``: n_steps·n_envs/16, at least 1
    :param aux_learning_rate: of the auxiliary phase's own optimiser, a number or a schedule of the remaining progress
    :param beta_clone: β_clone ≥ 0, weight of the KL divergence
    :param vf_true_coef: c_vf ≥ 0, weight of the value function's loss in the auxiliary phase
    :param vf_aux_coef: c_aux ≥ 0, weight of the auxiliary value head's loss
    :param prox_decay: as in :class:`~sb3_ppo_ewma.EwmaMixin`; the EWMA starts anew after every auxiliary phase
    :param advantage_decay: as in :class:`~sb3_ppo_ewma.EwmaMixin`; ``None`` with ``normalize_advantage=False``
    :param args: positional arguments of the algorithm this is mixed into
    :param kwargs: keyword arguments of :class:`~sb3_ppo_ewma.EwmaMixin` and the algorithm this is mixed into
    :raises TypeError: for an unknown argument or one of the wrong type
    :raises ValueError: for a value out of its range, before anything is built
    """

    aux_optimizer: th.optim.Optimizer
    aux_lr_schedule: Schedule
    phase_buffer: PhaseBuffer | None

    _own_states: ClassVar[tuple[str, ...]] = ("aux_optimizer",)
    _own_buffers: ClassVar[tuple[str, ...]] = ("phase_buffer",)
    _further_optimizers: ClassVar[Mapping[str, str]] = {
        **EwmaMixin._further_optimizers,
        "aux_optimizer": "aux_lr_schedule",
    }
    _sb3_defaults: ClassVar[Mapping[str, Any]] = {"n_epochs": 1}
    _default_advantage_decay: ClassVar[float | None] = 0.0
    # What the policy must be derived from
    _head: ClassVar[type] = AuxiliaryHeadMixin

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": PPGPolicy,
        "CnnPolicy": PPGCnnPolicy,
        "MultiInputPolicy": PPGMultiInputPolicy,
        "ImpalaPolicy": PPGImpalaPolicy,
    }

    def __init__(
        self,
        *args: Any,
        n_policy_iterations: int = 32,
        n_aux_epochs: int = 6,
        aux_batch_size: int | None = None,
        aux_learning_rate: float | Schedule = 5e-4,
        beta_clone: float = 1.0,
        vf_true_coef: float = 1.0,
        vf_aux_coef: float = 1.0,
        prox_decay: float | Literal["auto"] | None = None,
        advantage_decay: float | None = 0.0,
        **kwargs: Any,
    ) -> None:
        self.n_policy_iterations = n_policy_iterations
        self.n_aux_epochs = n_aux_epochs
        self.aux_batch_size = aux_batch_size
        self.aux_learning_rate = aux_learning_rate
        self.beta_clone = beta_clone
        self.vf_true_coef = vf_true_coef
        self.vf_aux_coef = vf_aux_coef
        # Counters, saved with the other attributes: phases so far, rollouts stored in the present one
        self._n_phases = 0
        self._n_phase_rollouts = 0
        self._phase_progress = PhaseProgress()
        super().__init__(*args, prox_decay=prox_decay, advantage_decay=advantage_decay, **kwargs)
        if "phase_buffer" in vars(self):
            self._check_memory()

    # ------------------------------------------------------------------ construction

    @classmethod
    def _needed_policies(cls) -> dict[type, str]:
        return {cls._head: "which has the auxiliary value head", **super()._needed_policies()}

    def _fits_built_model(self) -> dict[str, bool]:
        buffer = self.phase_buffer
        return {
            **super()._fits_built_model(),
            "n_policy_iterations": buffer is None or self.n_policy_iterations == buffer.n_rollouts,
            "n_aux_epochs": (buffer is None) == (self.n_aux_epochs == 0),
        }

    def _setup_model(self) -> None:
        super()._setup_model()
        self.aux_lr_schedule = self._make_aux_lr_schedule()
        self.aux_optimizer = make_optimizer(self.policy, self.aux_lr_schedule)
        evaluation = self.policy_evaluation
        self.phase_buffer = (
            PhaseBuffer(self.n_policy_iterations, evaluation.step_fields, evaluation.sequence_fields)
            if self.n_aux_epochs > 0
            else None
        )

    def _make_aux_lr_schedule(self) -> Schedule:
        return FloatSchedule(check_schedule("aux_learning_rate", self.aux_learning_rate))

    def _maybe_recommend_cpu(self, mlp_class_name: str = PPGPolicy.__name__) -> None:
        super()._maybe_recommend_cpu(mlp_class_name)

    # ------------------------------------------------------------------ training

    def _end_iteration(self, rollout: Rollout) -> None:
        super()._end_iteration(rollout)
        if self.phase_buffer is None:
            return
        self.phase_buffer.add(rollout.buffer)
        if self.phase_buffer.is_full:
            try:
                self._train_auxiliary_phase(self.phase_buffer)
                self._n_phases += 1
            finally:
                # Also when the phase is interrupted: the policy may have left its average behind, and the next phase
                # begins.
                self.phase_buffer.clear()
                self._n_phase_rollouts = 0
                if self.policy_ewma is not None:
                    self.policy_ewma.reset()
                self._phase_progress.clear()
        self._n_phase_rollouts = len(self.phase_buffer)
        self.logger.record("aux/n_phases", self._n_phases)
        self.logger.record("aux/phase_progress", self._n_phase_rollouts / self.n_policy_iterations)

    def _train_auxiliary_phase(self, buffer: PhaseBuffer) -> None:
        learning_rate = scheduled_learning_rate(self, "aux_learning_rate", self.aux_lr_schedule)
        update_learning_rate(self.aux_optimizer, learning_rate)
        iteration = make_iteration(self, None)
        phase = AuxiliaryPhase(
            self._engines.engine_for(self, iteration, [self.aux_optimizer], is_auxiliary=True),
            iteration,
            self.aux_optimizer,
            AuxiliaryCoefficients(self.beta_clone, self.vf_true_coef, self.vf_aux_coef),
            self.aux_batch_size or default_aux_batch_size(self.n_steps * self.n_envs),
        )
        with naming_broken_tensors(self):
            phase.train(buffer, self.n_aux_epochs, self._phase_progress)
        log_phase(self, iteration, learning_rate)

    # ------------------------------------------------------------------ learning and saving

    def _setup_learn(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._setup_learn(*args, **kwargs)
        self.aux_lr_schedule = self._make_aux_lr_schedule()  # the learning rate may have been set by hand
        if self.phase_buffer is None:
            self._n_phase_rollouts = 0
            return result
        self._check_memory()
        self._announce_phase(result[0])
        if len(self.phase_buffer) < self._n_phase_rollouts:
            warn_caller(
                f"The stored rollouts of the policy phase are missing ({self._n_phase_rollouts} when the model was "
                "saved): the phase starts anew. To continue it, write them with save_replay_buffer() beside the model "
                "and read them with load_replay_buffer()."
            )
            self._n_phase_rollouts = len(self.phase_buffer)
        return result

    def _check_memory(self) -> None:
        if self.phase_buffer is not None:
            self.phase_buffer.check_memory(self.rollout_buffer)

    def _announce_phase(self, total_timesteps: int) -> None:
        n_missing = self.n_policy_iterations - len(cast(PhaseBuffer, self.phase_buffer))
        if self.stale_rollouts is not None:
            n_missing += self.stale_rollouts.missing
        rollout = self.n_steps * self.n_envs
        n_coming = math.ceil((total_timesteps - self.num_timesteps) / rollout)
        if self.verbose >= 1 and n_missing > n_coming:
            print(
                f"The next auxiliary phase is {n_missing * rollout} steps away (n_policy_iterations="
                f"{self.n_policy_iterations} rollouts of {rollout} steps) and will not be reached"
            )

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        result = super()._init_callback(callback, progress_bar)
        self._phase_progress = PhaseProgress(result)
        return result

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "aux_lr_schedule", "_phase_progress"]


class PPG(AuxiliaryPhaseMixin, PPO):
    """
    Phasic Policy Gradient: PPO with an auxiliary phase that distils the value function into the policy network.

    Paper: https://arxiv.org/abs/2009.04416 (Cobbe, Hilton, Klimov, Schulman: Phasic Policy Gradient)
    Code of the authors: https://github.com/openai/phasic-policy-gradient

    All parameters of ``stable_baselines3.PPO`` in the same order; those of :class:`AuxiliaryPhaseMixin` and
    :class:`~sb3_ppo_ewma.EwmaMixin` by keyword. The defaults are SB3's, but for those that make the algorithm, which
    are the paper's: ``n_policy_iterations=32``, ``n_epochs=1``, ``n_aux_epochs=6``, ``aux_learning_rate=5e-4``,
    ``beta_clone=1.0``, ``vf_true_coef=1.0``, ``advantage_decay=0.0``, a critic of its own (``critic_arch="dual"`` in
    ``policy_kwargs``) and ``aux_batch_size``, a sixteenth of a rollout.

    >>> from sb3_ppo_ewma import PPG
    >>> model = PPG("MlpPolicy", "CartPole-v1", n_steps=64, n_policy_iterations=2).learn(128)
    """


class EwmaDefaultMixin(AuxiliaryPhaseMixin):
    """
    Changes the default of ``prox_decay`` to ``"auto"``. Place it first.

    :param args: positional arguments of the algorithm this is mixed into
    :param prox_decay: as in :class:`~sb3_ppo_ewma.EwmaMixin`
    :param kwargs: keyword arguments of the algorithm this is mixed into
    """

    def __init__(self, *args: Any, prox_decay: float | Literal["auto"] | None = "auto", **kwargs: Any) -> None:
        super().__init__(*args, prox_decay=prox_decay, **kwargs)


class PPGEWMA(EwmaDefaultMixin, PPG):
    """
    PPG-EWMA: :class:`PPG` whose proximal policy is an exponentially weighted moving average, which starts anew after
    every auxiliary phase. Only the default ``prox_decay="auto"`` differs from :class:`PPG`.

    Paper: https://arxiv.org/abs/2110.00641 (Hilton, Cobbe, Schulman: Batch size-invariance for policy optimization)
    Code of the authors: https://github.com/openai/ppo-ewma
    """
