"""PPO-EWMA: PPO whose proximal policy is a moving average, as a mixin for any PPO-like SB3 algorithm."""

from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, ClassVar, Literal, TypeVar, cast

import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import (
    DictRolloutBufferSamples,
    GymEnv,
    MaybeCallback,
    RolloutBufferSamples,
)
from stable_baselines3.common.utils import update_learning_rate

from sb3_ppo_ewma._arguments import (
    EngineChoice,
    KlEstimator,
    LagMode,
    StalenessMode,
    bind_arguments,
    logging_arguments,
    merged_signature,
    scheduled_learning_rate,
)
from sb3_ppo_ewma._engine.iteration import Engine, Iteration, Objective, make_iteration, objectives
from sb3_ppo_ewma._engine.selection import EngineSelector
from sb3_ppo_ewma._finite import check_trained_tensors, naming_broken_tensors
from sb3_ppo_ewma._parallel.as_ready import collect_as_ready
from sb3_ppo_ewma._parallel.collector import Collector, ending_collection
from sb3_ppo_ewma._parallel.data_parallel import DataParallel, reporting_errors
from sb3_ppo_ewma._parallel.process_group import DataParallelChoice
from sb3_ppo_ewma._rules import building, check_built_model, check_learn_arguments, check_to_learn, checked_arguments
from sb3_ppo_ewma.advantages import MomentsEwma
from sb3_ppo_ewma.checkpointing.generators import preserved_generators
from sb3_ppo_ewma.checkpointing.run_checkpoint import ResumableMixin
from sb3_ppo_ewma.evaluation import PolicyEvaluation
from sb3_ppo_ewma.ewma import ParameterEwma, decay_from_center_of_mass, default_center_of_mass
from sb3_ppo_ewma.following import follow_policy, make_optimizer
from sb3_ppo_ewma.networks import with_features_extractor
from sb3_ppo_ewma.policies import ImpalaPolicy, copy_policy, uncompiled
from sb3_ppo_ewma.rollouts import Rollout, StaleRollouts, check_full, naming_non_finite
from sb3_ppo_ewma.training_log import log_training
from sb3_ppo_ewma.tuned_settings import change_env, check_fits, fit_to_envs, quietly_about_size

SelfEwma = TypeVar("SelfEwma", bound="EwmaMixin")


class EwmaMixin(ResumableMixin):
    """
    Decouples the proximal from the behaviour policy in a PPO-like SB3 algorithm. Place it first:
    ``class PPOEWMA(EwmaMixin, PPO)``. Collection, ``learn`` and ``predict`` stay the algorithm's.

    Source: Hilton, Cobbe, Schulman 2022, https://arxiv.org/abs/2110.00641

    :param prox_decay: β_prox in [0, 1), decay of the EWMA of the parameters per gradient step. ``"auto"``: its centre
        of mass is the number of minibatches in one epoch over a rollout, max(1, ⌈n_steps·n_envs/batch_size⌉), as in
        the paper, with more than five epochs half of all those of an iteration, with ``staleness`` all of them;
        ``None``: no EWMA, the proximal policy is the behaviour policy, as in PPO
    :param kl_coef: β ≥ 0, weight of KL(π_prox ‖ π_θ) in the loss; can be combined with the clip or replace it
        (``clip_range=None``)
    :param kl_estimator: ``"sample"``: ½(log π_θ − log π_prox)² on the actions taken, as in the paper's released
        code; ``"analytic"``: the divergence of the distributions, as in its formula
    :param max_importance_ratio: M ≥ 1, cap on π_θ/π_behav; ``None``: no cap
    :param advantage_decay: ``None``: advantages are normalised per minibatch, as in SB3; d in [0, 1): over whole
        rollouts, with an EWMA of their moments over iterations (0: this rollout only)
    :param n_epochs_value: number of value epochs, run before the policy epochs with an optimiser of their own; ``None``
        or the same as ``n_epochs``: one joint loss, as in SB3
    :param recompute_advantages: compute advantages and returns anew with the current value function at the start of
        every epoch but the first (Andrychowicz et al. 2020, https://arxiv.org/abs/2006.05990)
    :param staleness: number of iterations a rollout waits before it is trained on (the paper's artificial staleness)
    :param staleness_mode: the policies of a stale rollout. ``"decoupled"``: π_prox is the policy at the start of the
        iteration, π_behav the one that collected; ``"behavior"``: the collecting policy is both; ``"proximal"``: the
        policy at the start of the iteration is both. With ``prox_decay`` not ``None``, the EWMA is π_prox in every
        mode, which then only decides what π_behav is
    :param engine: how gradient steps and collection are computed. ``"auto"``: in the fastest way that equals the
        definition up to rounding, see :meth:`explain_engine`; ``"reference"``: by the definition, as SB3 to the bit
    :param tuned_for_n_envs: the number of environments that the hyper-parameters are for: with another one they are
        rescaled to behave the same (:func:`~sb3_ppo_ewma.batch_scaling.rescale`); ``None``: they are used as given
    :param torch_compile: make each gradient step as one compiled graph, with the same results up to rounding; a string
        is a mode of ``torch.compile``. Compiling takes up to a minute. A warning says why a model is trained without
    :param data_parallel: the processes that train this model together. ``None``: those of the default process group of
        ``torch.distributed``, if it has several; ``True``: those, or an error if there are none; ``False``: only this
        one; a process group: its processes. Saved models do not keep a process group
    :param max_policy_lag: collect rollouts in a second process, at the same time as this one trains. When a rollout is
        trained on, its policy is this many updates behind, or fewer where ``learn`` begins; 0: the processes take
        turns; ``None``: collect in this process. ``staleness_mode`` applies to these rollouts
    :param lag_mode: ``"fixed"``: the lag does not depend on timing, the same seed gives the same numbers; ``"newest"``:
        the newest policy that there is when a rollout begins
    :param collector_timeout: training aborts if the environments make no step for this many seconds
    :param collect: ``"as_ready"``: environments of a ``SubprocVecEnv`` do not wait for each other within a rollout
    :param ppo_args: positional arguments of the algorithm this is mixed into. ``clip_range`` may also be ``None`` or a
        negative constant: no clip
    :param ppo_kwargs: keyword arguments of the algorithm this is mixed into
    :raises TypeError: for an unknown argument or one of the wrong type
    :raises ValueError: for a value out of its range, before anything is built
    """

    policy: Any  # an ActorCriticPolicy; the families narrow it
    policy_ewma: ParameterEwma | None
    advantage_moments: MomentsEwma | None
    value_optimizer: th.optim.Optimizer | None
    stale_rollouts: StaleRollouts | None
    batch_size: Any  # int; the recurrent and the maskable family also take None
    n_epochs: int
    clip_range: Any
    clip_range_vf: Any
    normalize_advantage: bool
    target_kl: float | None

    _collector: Collector | None = None
    _data_parallel: DataParallel | None = None
    _own_states: ClassVar[tuple[str, ...]] = ("policy_ewma", "advantage_moments", "value_optimizer")
    _own_buffers: ClassVar[tuple[str, ...]] = ("stale_rollouts",)
    # Optimisers beside the policy's own, of the same parameters, with the schedules of their learning rates
    _further_optimizers: ClassVar[Mapping[str, str]] = {"value_optimizer": "lr_schedule"}

    # A further term of the policy's loss: a method from (Evaluation, Minibatch) to a tensor of shape () with gradient
    extra_loss: Any = None
    policy_evaluation: ClassVar[PolicyEvaluation] = PolicyEvaluation()
    # Rollout buffers whose minibatches are gathered on the device, with the minibatches' class
    _has_masks: ClassVar[bool] = False  # whether it takes action masks
    samples_classes: ClassVar[Mapping[type[RolloutBuffer], type[Any]]] = {
        RolloutBuffer: RolloutBufferSamples,
        DictRolloutBuffer: DictRolloutBufferSamples,
    }

    _sb3_defaults: ClassVar[Mapping[str, Any]] = {}
    _default_advantage_decay: ClassVar[float | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__signature__ = merged_signature(cls)  # type: ignore[attr-defined]  # read by help() and inspect

    def __init__(
        self,
        *ppo_args: Any,
        prox_decay: float | Literal["auto"] | None = "auto",
        kl_coef: float = 0.0,
        kl_estimator: KlEstimator = "sample",
        max_importance_ratio: float | None = 100.0,
        advantage_decay: float | None = None,
        n_epochs_value: int | None = None,
        recompute_advantages: bool = False,
        staleness: int = 0,
        staleness_mode: StalenessMode = "decoupled",
        engine: EngineChoice = "auto",
        tuned_for_n_envs: int | None = None,
        torch_compile: bool | str = False,
        data_parallel: DataParallelChoice = None,
        max_policy_lag: int | None = None,
        lag_mode: LagMode = "fixed",
        collector_timeout: float = 600.0,
        collect: Literal["together", "as_ready"] = "together",
        **ppo_kwargs: Any,
    ) -> None:
        given, arguments = bind_arguments(type(self), self._sb3_class(), ppo_args, ppo_kwargs)
        given = {**self._sb3_defaults, **given}
        arguments |= given
        self.prox_decay = prox_decay
        self.kl_coef = kl_coef
        self.kl_estimator: KlEstimator = kl_estimator
        self.max_importance_ratio = max_importance_ratio
        self.advantage_decay = advantage_decay
        self.n_epochs_value = n_epochs_value
        self.recompute_advantages = recompute_advantages
        self.staleness = staleness
        self.staleness_mode: StalenessMode = staleness_mode
        self.engine: EngineChoice = engine
        self.tuned_for_n_envs = tuned_for_n_envs
        self.torch_compile = torch_compile
        self.data_parallel = data_parallel
        self.max_policy_lag = max_policy_lag
        self.lag_mode: LagMode = lag_mode
        self.collector_timeout = collector_timeout
        self.collect = collect
        arguments = checked_arguments(self, given, arguments)

        # Only what was given is passed on: a class in between may have defaults of its own.
        given = {name: arguments[name] for name in given}
        if given.get("policy_kwargs"):
            given["policy_kwargs"] = with_features_extractor(given["policy_kwargs"])
        if self.advantage_decay is not None:
            # SB3 refuses minibatches and rollouts of one sample, which moments over iterations allow.
            given["normalize_advantage"] = False
        with quietly_about_size() if tuned_for_n_envs is not None else nullcontext():
            super().__init__(**{**given, "_init_setup_model": False})
        if self.advantage_decay is not None:
            self.normalize_advantage = True
        if arguments["_init_setup_model"]:
            self._setup_model()

    @classmethod
    def _needed_policies(cls) -> dict[type, str]:
        """
        :return: by class that the policy must be derived from, what that class has
        """
        return {}

    def _fits_built_model(self) -> dict[str, bool]:
        """
        :return: by name of a parameter, whether the model was built for its present value
        """
        queue_length = 0 if self.stale_rollouts is None else self.stale_rollouts.staleness
        return {
            "prox_decay": (self.prox_decay is None) == (self.policy_ewma is None),
            "advantage_decay": (self.advantage_decay is None) == (self.advantage_moments is None),
            "n_epochs_value": self._has_value_epochs() == (self.value_optimizer is not None),
            "staleness": self.staleness == queue_length,
        }

    def _setup_model(self) -> None:
        with building(self):
            fit_to_envs(self)
            super()._setup_model()
        self.policy_ewma = None if self.prox_decay is None else ParameterEwma(uncompiled(self.policy))
        self.advantage_moments = None if self.advantage_decay is None else MomentsEwma(self.advantage_decay)
        self.value_optimizer = make_optimizer(self.policy, self.lr_schedule) if self._has_value_epochs() else None
        self.stale_rollouts = StaleRollouts(self.staleness) if self.staleness > 0 else None
        self._engines = EngineSelector()
        self._has_warned_of_restart = False

    @property
    def _is_stale(self) -> bool:
        return self.staleness > 0 or bool(self.max_policy_lag)

    def _has_value_epochs(self) -> bool:
        return self.n_epochs_value not in (None, self.n_epochs)

    @property
    def proximal_policy(self) -> ActorCriticPolicy | None:
        """
        :return: π_prox as it is now, a new policy with the EWMA of the parameters, to predict with, evaluate or save;
            with gSDE, its exploration noise is drawn anew. ``None`` with ``prox_decay=None``
        :raises ValueError: if the policy cannot be copied
        """
        if self.policy_ewma is None:
            return None
        with preserved_generators(self.device):
            follow_policy(self)
            policy: ActorCriticPolicy = copy_policy(self.policy, self.policy_ewma, self.policy_kwargs)
            if self.use_sde:
                policy.reset_noise()  # follows the averaged standard deviation
        return policy

    @property
    def current_prox_decay(self) -> float | None:
        """
        :return: β_prox with ``"auto"`` resolved for the present number of environments, ``None`` without EWMA
        """
        if self.prox_decay != "auto":
            return self.prox_decay
        n_samples = self.n_steps * self.n_envs
        return decay_from_center_of_mass(
            default_center_of_mass(n_samples, self.batch_size, self.n_epochs, self._is_stale)
        )

    @property
    def current_engine(self) -> str:
        """
        :return: name of the engine of the last training, before the first one of the next
        """
        choice = self._engines.choice or self._engines.choose(self, make_iteration(self, None), self._optimizers())
        return cast(str, choice.engine.name)

    def explain_engine(self) -> str:
        """
        :return: which engine trains this model as it is now, why none of the faster ones does, and what they need
        """
        return self._engines.choose(self, make_iteration(self, None), self._optimizers()).explanation()

    def collect_rollouts(self, *args: Any, **kwargs: Any) -> bool:
        """
        As in the algorithm this is mixed into. An error that a NaN or Inf caused names it.

        :param args: arguments of the algorithm's method
        :param kwargs: arguments of the algorithm's method
        :return: False when a callback ended the collection
        :raises ValueError: if the environment or the network returned NaN or Inf
        """
        collect = self._collect_here if self._collector is None else partial(self._collector.collect_rollouts, self)
        with self.within_rollout():
            continues = collect(*args, **kwargs)
        return continues if self._data_parallel is None else self._data_parallel.pool_rollouts(continues)

    def _collect_here(self, *args: Any, **kwargs: Any) -> bool:
        # In the process that has the environments
        own = super().collect_rollouts
        with naming_non_finite(self), self._engines.collecting(self):
            return collect_as_ready(self, own, *args, **kwargs) if self.collect == "as_ready" else own(*args, **kwargs)

    def _next_rollout(self) -> Rollout | None:
        """
        :return: the rollout to train on, ``None`` while a queue of stale rollouts fills
        """
        rollout = self.policy_evaluation.collected_rollout(self)
        check_full(rollout.buffer)
        with naming_non_finite(self):
            rollout.check_finite()
        return rollout if self.stale_rollouts is None else self.stale_rollouts.exchange(rollout)

    def train(self) -> None:
        """Update policy and value function with the next rollout; while a queue of stale rollouts fills, do nothing."""
        check_built_model(self)  # a callback may have changed it
        rollout = self._next_rollout()
        self._n_rollouts += 1
        if rollout is None:
            return
        self.policy.set_training_mode(True)
        follow_policy(self)
        optimizers = self._optimizers()
        # Overrides written for SB3's PPO expect its one optimiser.
        self._update_learning_rate(optimizers if len(optimizers) > 1 else optimizers[0])
        iteration = make_iteration(self, rollout)
        advantage_std = iteration.normalizer.include(rollout.buffer.advantages)
        engine = self._engines.engine_for(self, iteration, optimizers)
        with naming_broken_tensors(self):
            try:
                for index, objective in enumerate(objectives(self)):
                    if index > 0 and self.recompute_advantages:
                        engine.synchronize()
                        iteration.recompute_advantages(rollout)
                    finished = self._train_epoch(engine, iteration, objective)
                    self._n_updates += objective.policy
                    if not finished:
                        break
            finally:
                engine.synchronize()
                if self.policy_ewma is not None:
                    self.policy_ewma.remember()
        self._engines.report(self, iteration)
        log_training(self, iteration, rollout, advantage_std)
        self._end_iteration(rollout)
        if self._data_parallel is not None:
            self._data_parallel.end_training()

    def _train_epoch(self, engine: Engine, iteration: Iteration, objective: Objective) -> bool:
        """
        :return: False if training ends with this epoch: ``target_kl`` forbade a step, or it could not be made
        """
        iteration.statistics.begin_epoch()
        iteration.batch_size = self.batch_size
        finished = all(engine.step(minibatch, objective) for minibatch in engine.minibatches())
        engine.end_epoch()
        if iteration.exceeded_kl is not None and self.verbose >= 1:
            print(f"Early stopping at n_updates={self._n_updates} due to reaching max kl: {iteration.exceeded_kl:.2f}")
        return finished

    def _optimizers(self) -> list[th.optim.Optimizer]:
        return [self.policy.optimizer, *([] if self.value_optimizer is None else [self.value_optimizer])]

    def _end_iteration(self, rollout: Rollout) -> None:
        """Called with its rollout at the end of every training, for algorithms that do more."""

    def _update_learning_rate(self, optimizers: list[th.optim.Optimizer] | th.optim.Optimizer) -> None:
        self.logger.record("train/learning_rate", scheduled_learning_rate(self, "learning_rate", self.lr_schedule))
        # Twice, as SB3: a schedule may count.
        learning_rate = scheduled_learning_rate(self, "learning_rate", self.lr_schedule)
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            update_learning_rate(optimizer, learning_rate)

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """
        As in SB3. With ``tuned_for_n_envs``, the number of environments may be another one.

        :param env: the new environment
        :param force_reset: whether to reset it before training, which another number of environments always does
        """
        change_env(self, env, force_reset, super().set_env)

    def _setup_learn(self, *args: Any, **kwargs: Any) -> Any:
        check_to_learn(self)
        check_trained_tensors(self)
        check_fits(self)
        self._data_parallel = DataParallel.start(self)
        self._collector = Collector.prepare(self)
        own, group = super()._setup_learn, self._data_parallel
        result = (own if group is None else partial(group.setup_learn, own))(*args, **kwargs)
        if self.stale_rollouts is not None:
            self.stale_rollouts.warn_if_missing(self._n_rollouts)
        return result

    def learn(
        self: SelfEwma,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int | None = 1,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
        **kwargs: Any,
    ) -> SelfEwma:
        """
        Train, as the algorithm this is mixed into.

        :param total_timesteps: number of environment steps
        :param callback: called at every step
        :param log_interval: iterations between logs; ``None``: no logs
        :param tb_log_name: name of the run for tensorboard; ``None``: that of the class, or the algorithm's own default
        :param reset_num_timesteps: whether to count steps from 0; an auxiliary phase goes on in any case
        :param progress_bar: show a progress bar, which also tells of an auxiliary phase
        :param kwargs: what else the algorithm's method takes
        :return: the model
        """
        kwargs |= {"reset_num_timesteps": reset_num_timesteps, "progress_bar": progress_bar}
        kwargs |= logging_arguments(self, super().learn, log_interval, tb_log_name)
        with reporting_errors(self), ending_collection(self):
            check_learn_arguments(total_timesteps, log_interval)
            return super().learn(total_timesteps, callback, **kwargs)

    def dump_logs(self, iteration: int = 0) -> None:
        """
        Write the log, in a data-parallel training with the episodes of all processes.

        :param iteration: number of rollouts so far
        """
        with nullcontext() if self._data_parallel is None else self._data_parallel.pooled_episodes():
            super().dump_logs(iteration)

    def _excluded_save_params(self) -> list[str]:
        own = ["_engines", "_has_warned_of_restart", "_collector", "_data_parallel", "_built_for"]
        return [*super()._excluded_save_params(), *own]


class PPOEWMA(EwmaMixin, PPO):
    """
    PPO-EWMA: Proximal Policy Optimization whose proximal policy is an exponentially weighted moving average.

    Paper: https://arxiv.org/abs/2110.00641 (Hilton, Cobbe, Schulman: Batch size-invariance for policy optimization)
    Code of the authors: https://github.com/openai/ppo-ewma

    All parameters of ``stable_baselines3.PPO`` in the same order with the same defaults; those of :class:`EwmaMixin` by
    keyword. With ``prox_decay=None`` it computes what SB3's PPO computes, as long as no ratio π_θ/π_behav reaches
    ``max_importance_ratio``: up to rounding, or with ``engine="reference"`` to the bit.

    >>> from sb3_ppo_ewma import PPOEWMA
    >>> model = PPOEWMA("MlpPolicy", "CartPole-v1", n_steps=64).learn(64)
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {**PPO.policy_aliases, "ImpalaPolicy": ImpalaPolicy}
