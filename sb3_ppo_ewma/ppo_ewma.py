"""PPO-EWMA: PPO whose proximal policy is a moving average, as a mixin for any PPO-like SB3 algorithm."""

import contextlib
import copy
import functools
import math
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar, cast, get_args

import numpy as np
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import (
    DictRolloutBufferSamples,
    MaybeCallback,
    RolloutBufferSamples,
    Schedule,
)
from stable_baselines3.common.utils import explained_variance, obs_as_tensor, update_learning_rate
from torch.distributions import Distribution

from sb3_ppo_ewma import losses
from sb3_ppo_ewma._arguments import (
    CLIP_OFF,
    bind_arguments,
    check_choice,
    check_integer,
    check_normalization,
    check_number,
    check_sb3_arguments,
    checked_clip_range,
    is_clip_off,
    merged_signature,
    warn_caller,
)
from sb3_ppo_ewma._engine import forward
from sb3_ppo_ewma._engine.compilation import UNROLLED, CompilationError, CompiledSteps
from sb3_ppo_ewma._engine.flat_mlp import ROWS, FlatMlp, Samples, can_be_flat
from sb3_ppo_ewma._engine.gradient_steps import GradientSteps, TrainStatistics
from sb3_ppo_ewma._engine.mlp import MlpPolicy, is_mlp_policy
from sb3_ppo_ewma._engine.parts import accumulated, can_be_parted, part_size, split
from sb3_ppo_ewma._parallel.data_parallel import DataParallelMixin
from sb3_ppo_ewma.checkpointing.generators import preserved_generators
from sb3_ppo_ewma.checkpointing.saving import uncompiled
from sb3_ppo_ewma.distributions import standard_deviation, torch_distributions
from sb3_ppo_ewma.ewma import (
    MomentsEwma,
    ParameterEwma,
    center_of_mass_from_decay,
    decay_from_center_of_mass,
    default_center_of_mass,
    standardize,
)
from sb3_ppo_ewma.losses import Coefficient, Coefficients, LossTerms
from sb3_ppo_ewma.networks import with_features_extractor
from sb3_ppo_ewma.policies import ImpalaPolicy
from sb3_ppo_ewma.rollouts import (
    BufferData,
    DeviceData,
    Rollout,
    StaleRollouts,
    TrainingData,
    is_finite,
    observations_at,
)

KlEstimator = Literal["sample", "analytic"]
StalenessMode = Literal["decoupled", "behavior", "proximal"]
CompileMode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
SelfPPOEWMA = TypeVar("SelfPPOEWMA", bound="PPOEWMA")

_ANALYTIC = "kl_estimator='analytic' (there is also 'sample')"

# Smallest batch for evaluating a whole rollout without gradients
EVALUATION_BATCH_SIZE = 256

# Methods by which families of algorithms evaluate policies, and those that compute the losses
_EVALUATION = ("_evaluate_actions", "_log_prob", "_padding_mask")
_LOSSES = ("_loss_terms", "_loss_terms_of_part", "_policy_loss_terms", "_policy_statistics", "_log_prob_prox",
           "_log_prob_behav", "_normalized_advantages")  # fmt: skip

# What belongs to this process
_PROCESS = ("_compiled_steps", "_gave_up_compiling", "_shortcuts", "_flat", "_is_parted", "_part_size", "_steps")

# What is to blame for a step that was not made, by what shows it
_BLAME = {
    "log_ratio_old": "log-probabilities",
    "value_loss": "values",
    "entropy_loss": "entropy",
    "policy_gradient_loss": "policy loss",
    "kl_loss": "KL penalty",
}


class Epoch(NamedTuple):
    """
    Which losses one pass over a rollout minimises.

    :param policy: the policy loss with the entropy bonus; each of its gradient steps moves the EWMA
    :param value: the value loss
    """

    policy: bool
    value: bool


class EwmaMixin(DataParallelMixin):
    """
    Decouples the proximal from the behaviour policy in a PPO-like SB3 algorithm. Place it first:
    ``class PPOEWMA(EwmaMixin, PPO)``. Collection, ``learn`` and ``predict`` stay the algorithm's; families differ in
    :meth:`_make_policy`, :meth:`_evaluate_actions`, :meth:`_padding_mask` and :meth:`_predict_values`.

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
    :param torch_compile: make each gradient step as one compiled graph, with the same results up to rounding; a string
        is a mode of ``torch.compile``. Compiling takes some seconds to a minute once. What cannot be compiled is
        trained without it, with a warning
    :param async_rollouts: collect rollouts in a process of their own, with a policy that lacks at most so many of the
        trainings before a rollout is trained on; it is forked when ``learn`` begins and takes the environments with
        it. 0: nothing happens at the same time; ``None``: no such process. ``staleness_mode`` says what the policies
        of such a rollout are
    :param async_timeout: seconds without a step of the environments after which that process is given up
    :param ppo_args: positional arguments of the algorithm this is mixed into, see there. ``clip_range`` may also be
        ``None`` or a negative constant: no clip
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

    _own_states: ClassVar[tuple[str, ...]] = (
        *DataParallelMixin._own_states,
        "policy_ewma",
        "advantage_moments",
        "value_optimizer",
    )

    _own_buffers: ClassVar[tuple[str, ...]] = ("stale_rollouts",)

    # Rollout buffers whose minibatches are gathered on the device, with the minibatches' class
    _samples_classes: ClassVar[Mapping[type[RolloutBuffer], type[Any]]] = {
        RolloutBuffer: RolloutBufferSamples,
        DictRolloutBuffer: DictRolloutBufferSamples,
    }

    # Defaults that differ from SB3's
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
        torch_compile: bool | str = False,
        async_rollouts: int | None = None,
        async_timeout: float = 600.0,
        **ppo_kwargs: Any,
    ) -> None:
        given, arguments = bind_arguments(type(self), self._sb3_class(), ppo_args, ppo_kwargs)
        given = {**self._sb3_defaults, **given}
        arguments |= given
        if not arguments["normalize_advantage"] and advantage_decay == self._default_advantage_decay:
            advantage_decay = None  # SB3's switch goes before a default of ours
        self.prox_decay = prox_decay
        self.kl_coef = kl_coef
        self.kl_estimator: KlEstimator = kl_estimator
        self.max_importance_ratio = max_importance_ratio
        self.advantage_decay = advantage_decay
        self.n_epochs_value = n_epochs_value
        self.recompute_advantages = recompute_advantages
        self.staleness = staleness
        self.staleness_mode: StalenessMode = staleness_mode
        self.torch_compile = torch_compile
        self.async_rollouts = async_rollouts
        self.async_timeout = async_timeout
        self._check_own_parameters()
        check_sb3_arguments(arguments, advantage_decay)

        # Only what was given is passed on: a class in between may have defaults of its own.
        if "clip_range" in given:
            given["clip_range"] = checked_clip_range(given["clip_range"])
        if given.get("policy_kwargs"):
            given["policy_kwargs"] = with_features_extractor(given["policy_kwargs"])
        if advantage_decay is not None:
            # SB3 refuses minibatches and rollouts of one sample, whose standard deviation is NaN. Moments over
            # iterations have no such limit.
            given["normalize_advantage"] = False
        super().__init__(**{**given, "_init_setup_model": False})
        if advantage_decay is not None:
            self.normalize_advantage = True
        if arguments["_init_setup_model"]:
            self._setup_model()

    # ------------------------------------------------------------------ construction

    def _check_own_parameters(self) -> None:
        if isinstance(self.prox_decay, str):
            check_choice("prox_decay", self.prox_decay, ("auto",), "a number in [0, 1) or None")
        elif self.prox_decay is not None:
            check_number("prox_decay", self.prox_decay, 0, 1)
        check_number("kl_coef", self.kl_coef, 0)
        check_choice("kl_estimator", self.kl_estimator, get_args(KlEstimator))
        check_choice("staleness_mode", self.staleness_mode, get_args(StalenessMode))
        if self.max_importance_ratio is not None:
            check_number("max_importance_ratio", self.max_importance_ratio, 1)
        if self.advantage_decay is not None:
            check_number("advantage_decay", self.advantage_decay, 0, 1)
        if self.n_epochs_value is not None:
            check_integer("n_epochs_value", self.n_epochs_value, minimum=1)
        check_integer("staleness", self.staleness, minimum=0)
        if self.async_rollouts is not None:
            check_integer("async_rollouts", self.async_rollouts, minimum=0)
            if "fork" not in multiprocessing.get_all_start_methods():
                raise ValueError(f"async_rollouts={self.async_rollouts} needs fork(), which this system does not have")
        check_number("async_timeout", self.async_timeout, 0)
        if not isinstance(self.torch_compile, bool):
            check_choice("torch_compile", self.torch_compile, get_args(CompileMode), "True or False")
        if not isinstance(self.recompute_advantages, bool):
            raise TypeError(f"recompute_advantages must be True or False, got {self.recompute_advantages!r}")
        unavailable = self._is_stale and self.staleness_mode == "behavior" and self.prox_decay is None
        if self.kl_coef > 0 and self.kl_estimator == "analytic" and unavailable:
            raise ValueError(
                "kl_estimator='analytic' needs the distributions of the proximal policy, but with prox_decay=None and "
                "staleness_mode='behavior' that is a past policy of which only log-probabilities are kept: "
                "use kl_estimator='sample'"
            )

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

    def _check_built_parameters(self) -> None:
        """
        Refuse parameters that were set by hand and that the model was not built for.
        """
        for name, fits in self._fits_built_model().items():
            if not fits:
                raise ValueError(
                    f"{name} was set to {getattr(self, name)!r} by hand, but the model was built for another value: "
                    f"save it and give {name} to load()"
                )
        if self.advantage_moments is not None:
            check_normalization(cast(float, self.advantage_decay), self.normalize_advantage)
            self.advantage_moments.decay = cast(float, self.advantage_decay)

    def _setup_model(self) -> None:
        if self.clip_range is None:  # load(..., clip_range=None) bypasses the constructor
            self.clip_range = CLIP_OFF
        super()._setup_model()
        self.policy_ewma = None if self.prox_decay is None else ParameterEwma(self._copy_policy(), self.policy)
        self.advantage_moments = None if self.advantage_decay is None else MomentsEwma(self.advantage_decay)
        self.value_optimizer = self._make_optimizer(self.lr_schedule) if self._has_value_epochs() else None
        self.stale_rollouts = StaleRollouts(self.staleness) if self.staleness > 0 else None
        self._compiled_steps: CompiledSteps | None = None
        self._gave_up_compiling = False
        self._shortcuts: dict[int, forward.StandardPolicy] = {}
        self._flat: FlatMlp | None = None
        self._is_parted = False
        self._part_size: int | None = None
        self._steps: GradientSteps
        # Policy at the start of the iteration, only built when something needs it
        self._recent_policy: ParameterEwma | None = None

    @property
    def _is_stale(self) -> bool:
        return self.staleness > 0 or bool(self.async_rollouts)

    def _has_value_epochs(self) -> bool:
        return self.n_epochs_value not in (None, self.n_epochs)

    def _make_optimizer(self, schedule: Schedule) -> th.optim.Optimizer:
        """
        :param schedule: of the learning rate
        :return: a further optimiser of all the policy's parameters, built as SB3 builds the policy's own
        """
        policy = self.policy
        optimizer = policy.optimizer_class(policy.parameters(), lr=schedule(1), **policy.optimizer_kwargs)
        return cast(th.optim.Optimizer, optimizer)

    def _make_policy(self, policy_kwargs: dict[str, Any]) -> ActorCriticPolicy:
        """
        :param policy_kwargs: keyword arguments of the policy
        :return: a new policy, built as the algorithm's ``_setup_model`` does
        """
        policy = self.policy_class(
            self.observation_space, self.action_space, self.lr_schedule, use_sde=self.use_sde, **policy_kwargs
        )
        return cast(ActorCriticPolicy, policy)

    def _copy_policy(self) -> ActorCriticPolicy:
        # Built anew, since copy.deepcopy() fails on policies that have been trained or use gSDE; from copied arguments,
        # since a module among them (a pre-trained encoder) would else be part of both policies.
        with preserved_generators(self.device):
            policy = self._make_policy(copy.deepcopy(self.policy_kwargs)).to(self.device)
        policy.load_state_dict(uncompiled(self.policy).state_dict())
        # SB3's policies leave some arguments out of what they save (share_features_extractor, the LSTM's size), and
        # come back without them when they are saved alone.
        parameters = functools.partial(_constructor_parameters, policy._get_constructor_parameters, self.policy_kwargs)
        policy._get_constructor_parameters = parameters  # type: ignore[method-assign]
        return policy

    @property
    def proximal_policy(self) -> ActorCriticPolicy | None:
        """
        :return: π_prox, the EWMA of the policy, to predict with, evaluate or save; it changes as training goes on. With
            gSDE, each access draws its exploration noise anew. ``None`` with ``prox_decay=None``
        """
        if self.policy_ewma is None:
            return None
        policy = cast(ActorCriticPolicy, self.policy_ewma.module)
        if self.use_sde:
            # Its exploration noise follows the averaged standard deviation.
            with preserved_generators(self.device):
                policy.reset_noise()
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

    # ------------------------------------------------------------------ hooks of the families

    def _evaluate_actions(
        self, policy: ActorCriticPolicy, samples: Any, actions: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        """
        :param policy: the current, proximal or recent policy
        :param samples: minibatch from the rollout buffer
        :param actions: its actions in the form the distribution expects
        :return: values, log-probabilities and entropies of the actions
        """
        shortcut = self._shortcuts.get(id(policy))
        if shortcut is not None:
            return shortcut.evaluate_actions(samples.observations, actions)
        return policy.evaluate_actions(samples.observations, actions)

    def _log_prob(self, policy: ActorCriticPolicy, samples: Any, actions: th.Tensor) -> th.Tensor:
        """
        :param policy: the proximal or recent policy
        :param samples: minibatch from the rollout buffer
        :param actions: its actions in the form the distribution expects
        :return: (batch,) the log-probabilities of :meth:`_evaluate_actions`
        """
        shortcut = self._shortcuts.get(id(policy))
        if shortcut is not None:
            return shortcut.log_prob(samples.observations, actions)
        return self._evaluate_actions(policy, samples, actions)[1]

    def _padding_mask(self, samples: Any) -> th.Tensor | None:
        """
        :param samples: minibatch from the rollout buffer
        :return: (batch,) bool, False for padding; ``None`` where nothing is padded
        """
        return None

    def _predict_values(self, buffer: Any, indices: slice) -> th.Tensor:
        """
        :param buffer: flattened rollout buffer
        :param indices: of its samples
        :return: current values of their observations
        """
        return cast(th.Tensor, self.policy.predict_values(observations_at(buffer, indices)))

    def _predict_last_values(self, rollout: Rollout) -> th.Tensor:
        """
        :param rollout: the rollout
        :return: current values of the observations after its last step
        """
        return cast(th.Tensor, self.policy.predict_values(obs_as_tensor(rollout.last_obs, self.device)))

    def _collected_rollout(self) -> Rollout:
        """
        :return: what ``collect_rollouts`` has just collected
        """
        return Rollout(self.rollout_buffer, self._last_obs, cast(np.ndarray, self._last_episode_starts))

    # ------------------------------------------------------------------ collection

    def collect_rollouts(self, *args: Any, **kwargs: Any) -> bool:
        """
        As in the algorithm this is mixed into; an error that comes from a NaN or Inf says so.

        :param args: see there
        :param kwargs: see there
        :return: False when a callback ended the collection
        :raises ValueError: if the environment or the network returned NaN or Inf
        """
        try:
            with self._fast_forward():
                return super().collect_rollouts(*args, **kwargs)
        except Exception as error:
            if self._last_obs is not None and not is_finite(self._last_obs):
                raise ValueError("NaN or Inf in the observations that the environment returned") from error
            self._check_parameters(error)
            raise

    def _check_parameters(self, error: Exception) -> None:
        for name, parameter in self.policy.named_parameters():
            if not bool(th.isfinite(parameter).all()):
                raise ValueError(f"NaN or Inf in the policy's parameter {name!r}") from error

    @contextlib.contextmanager
    def _fast_forward(self) -> Iterator[None]:
        policy = self.policy
        if not (self._is_fast and forward.is_standard(policy)):
            yield
            return
        shortcut = MlpPolicy(policy) if is_mlp_policy(policy) else forward.StandardPolicy(policy)
        policy.forward = shortcut.forward  # called by the policy itself, with its hooks
        try:
            yield
        finally:
            del policy.forward

    def _update_info_buffer(self, infos: list[dict[str, Any]], dones: np.ndarray | None = None) -> None:
        # Called at every step. The value of a truncated episode's last observation goes into the rewards, where a NaN
        # would be blamed on them, and an Inf may not show: tanh of it is 1.
        for info in infos:
            if info.get("TimeLimit.truncated", False) and not is_finite(info.get("terminal_observation", 0)):
                raise ValueError("NaN or Inf in the terminal observation that the environment returned")
        super()._update_info_buffer(infos, dones)

    def _next_rollout(self) -> Rollout | None:
        rollout = self._collected_rollout()
        try:
            rollout.check_finite()
        except ValueError as error:
            self._check_parameters(error)
            raise
        return rollout if self.stale_rollouts is None else self.stale_rollouts.exchange(rollout)

    # ------------------------------------------------------------------ training

    def train(self) -> None:
        """Update policy and value function with the next rollout; while a queue of stale rollouts fills, do nothing."""
        rollout = self._next_rollout()
        self._n_rollouts += 1
        if rollout is None:
            return
        self.policy.set_training_mode(True)
        optimizers = [self.policy.optimizer, self.value_optimizer]
        self._update_learning_rate([optimizer for optimizer in optimizers if optimizer is not None])
        self._start_iteration()
        advantage_std = self._update_advantage_moments(rollout)

        statistics = TrainStatistics()
        with self._gradient_steps(flattens=self.value_optimizer is None):
            self._train_epochs(rollout, statistics)
        statistics.check_finite(_BLAME, f"after {self._n_updates} epochs and {self.num_timesteps} steps")
        self._log_training(rollout, advantage_std, statistics)
        self._end_iteration(rollout)
        self._pool_log()

    def _train_epochs(self, rollout: Rollout, statistics: TrainStatistics) -> None:
        data = self._training_data(rollout)
        for index, epoch in enumerate(self._epochs()):
            if index > 0 and self.recompute_advantages:
                self._recompute_advantages(rollout)
                data.update_targets()
            finished = self._train_epoch(data, epoch, statistics)
            self._n_updates += epoch.policy
            if not finished:
                break

    def _training_data(self, rollout: Rollout) -> TrainingData:
        samples_class = self._samples_classes.get(type(rollout.buffer))
        return BufferData(rollout.buffer) if samples_class is None else DeviceData(rollout.buffer, samples_class)

    def _epochs(self) -> list[Epoch]:
        if self.value_optimizer is None:
            return [Epoch(policy=True, value=True)] * self.n_epochs
        n_epochs_value = cast(int, self.n_epochs_value)
        return [Epoch(policy=False, value=True)] * n_epochs_value + [Epoch(policy=True, value=False)] * self.n_epochs

    def _start_iteration(self) -> None:
        if self.policy_ewma is not None and self.policy_ewma.total_weight == 1:
            # No step is averaged yet, so the average is the policy itself, also when the user has since put other
            # parameters into it (a pre-trained policy, say).
            self.policy_ewma.reset(self.policy)
        if self._needs_recent_policy():
            if self._recent_policy is None:
                self._recent_policy = ParameterEwma(self._copy_policy())
            self._recent_policy.reset(self.policy)

    def _end_iteration(self, rollout: Rollout) -> None:
        """
        Called at the end of every training, for algorithms that do more.

        :param rollout: that was trained on
        """

    def _needs_recent_policy(self) -> bool:
        if self._is_stale and self.staleness_mode == "proximal":
            return True
        if self.policy_ewma is not None:
            return False
        return self._is_kl_analytic() or (self._is_stale and self.staleness_mode == "decoupled")

    def _train_epoch(self, data: TrainingData, epoch: Epoch, statistics: TrainStatistics) -> bool:
        """
        :return: False if training ends with this epoch
        """
        statistics.begin_epoch()
        coefficients = self._current_coefficients()
        optimizer = self.policy.optimizer if epoch.policy else cast(th.optim.Optimizer, self.value_optimizer)
        loss_terms: Callable[..., LossTerms] = self._loss_terms
        flat = self._flat
        groups: Iterator[list[tuple[Any, ...]]]
        if flat is None:
            given = self._given(coefficients)
            groups = ([(data, each, epoch, given)] for each in data.minibatches(self.batch_size))
        else:
            optimizer, loss_terms = flat.optimizer, flat.loss_terms
            groups = self._flat_minibatches(flat, data, coefficients, statistics)
        finished = all(
            self._gradient_step(loss_terms, minibatches, optimizer, statistics, updates_average=epoch.policy)
            for minibatches in groups
        )
        if flat is not None:
            statistics.condense(lambda rows: flat.statistics(rows, coefficients), ROWS)
            flat.write_back()
        return finished

    def _given(self, coefficients: Coefficients) -> Coefficients:
        """
        :return: as losses are given them; no compiled graph is to depend on their values
        """
        return coefficients if self._steps.compiled is None else coefficients.as_tensors(self.device)

    def _flat_minibatches(
        self, flat: FlatMlp, data: TrainingData, coefficients: Coefficients, statistics: TrainStatistics
    ) -> Iterator[list[tuple[Any, ...]]]:
        """
        :return: arguments of ``flat.loss_terms`` for each minibatch, alone or with those that are one graph with it
        """
        given, with_approx_kl = self._given(coefficients), self.target_kl is not None
        n_unrolled = 1 if self._steps.compiled is None or with_approx_kl else UNROLLED
        is_stale = self._is_stale and self.staleness_mode == "proximal"
        for samples, n_minibatches in data.blocks(self.batch_size, flat.features_dim):
            actions = forward.as_distributed(self.action_space, samples.actions)
            advantages = samples.advantages.view(n_minibatches, -1)
            columns = Samples(
                actions,
                self._normalized_advantages(advantages, None, coefficients).flatten(),
                samples.returns,
                samples.old_values,
                samples.old_log_prob,
                self._log_prob_behav(samples, actions) if is_stale else None,
                self._log_prob_prox(samples, actions) if self.policy_ewma is None else None,
            )
            parts = zip(
                flat.features(samples.observations).chunk(n_minibatches), columns.chunk(n_minibatches), strict=True
            )
            arguments = [(*part, given, with_approx_kl) for part in parts]
            n_grouped = n_minibatches // n_unrolled * n_unrolled
            yield from (arguments[i : i + n_unrolled] for i in range(0, n_grouped, n_unrolled))
            yield from ([each] for each in arguments[n_grouped:])
            # Rows of a block, not of an epoch, are there at the same time
            statistics.condense(lambda rows: flat.statistics(rows, coefficients), ROWS)

    @contextlib.contextmanager
    def _gradient_steps(self, flattens: bool = False) -> Iterator[None]:
        """
        Within this context :meth:`_gradient_step` makes steps, and what it needs stays what it is.

        :param flattens: whether the policy can be trained as a :class:`~sb3_ppo_ewma._engine.flat_mlp.FlatMlp`
        """
        compiled = self._compiler()
        policies = [self.policy, *(a.module for a in (self.policy_ewma, self._recent_policy) if a is not None)]
        may_round = self._is_fast or compiled is not None
        may_round = may_round and not self._is_kl_analytic() and not self._overrides(_EVALUATION)
        try:
            self._shortcuts = {
                id(policy): forward.StandardPolicy(policy)
                for policy in policies
                if may_round and forward.is_standard(policy)
            }
            self._is_parted = compiled is None and id(self.policy) in self._shortcuts and can_be_parted(self.policy)
            if flattens and may_round and all(map(is_mlp_policy, policies)) and not self._overrides(_LOSSES):
                mlp = MlpPolicy(self.policy)
                self._flat = FlatMlp(mlp, self.policy_ewma, compiled is None) if can_be_flat(mlp) else None
            self._steps = GradientSteps(
                self.policy,
                self.policy_ewma,
                max_grad_norm=self.max_grad_norm,
                max_kl=None if self.target_kl is None else 1.5 * self.target_kl,
                decay=self.current_prox_decay,
                may_fuse=self._is_fast,
                compiled=compiled,
                flat=self._flat,
                ranks=self._ranks,
            )
            with self._steps.training():
                yield
        finally:
            self._shortcuts, self._flat, self._is_parted, self._part_size = {}, None, False, None
            vars(self).pop("_steps", None)

    def _overrides(self, names: Sequence[str]) -> bool:
        """
        :return: whether one of these methods is not the mixin's
        """
        own = (getattr(getattr(self, name), "__func__", None) for name in names)
        return any(method is not getattr(EwmaMixin, name) for name, method in zip(names, own, strict=True))

    def _gradient_step(
        self,
        loss_terms: Callable[..., LossTerms],
        minibatches: list[tuple[Any, ...]],
        optimizer: th.optim.Optimizer,
        statistics: TrainStatistics,
        updates_average: bool = False,
    ) -> bool:
        """
        :return: False if training ends here: ``target_kl`` forbade the step, or it could not be made
        """
        steps = self._steps
        try:
            made = steps.step(loss_terms, minibatches, optimizer, statistics, updates_average)
        except CompilationError as reason:
            self._give_up_compiling(reason)
            steps.compiled = None
            made = steps.step(loss_terms, minibatches, optimizer, statistics, updates_average)
        if steps.exceeded_kl is not None and self.verbose >= 1:
            print(f"Early stopping at n_updates={self._n_updates} due to reaching max kl: {steps.exceeded_kl:.2f}")
        return made

    def _compiler(self) -> CompiledSteps | None:
        if not self.torch_compile or self._gave_up_compiling:
            return None
        if self._ranks is not None:
            self._give_up_compiling(CompilationError("data-parallel training averages gradients outside of graphs"))
            return None
        if self._compiled_steps is None:
            try:
                self._compiled_steps = CompiledSteps(None if self.torch_compile is True else self.torch_compile)
            except CompilationError as reason:
                self._give_up_compiling(reason)
        return self._compiled_steps

    def _give_up_compiling(self, reason: CompilationError) -> None:
        warn_caller(f"torch_compile={self.torch_compile!r} has no effect, training goes on without it: {reason}")
        self._gave_up_compiling = True
        self._compiled_steps = None

    @property
    def _is_fast(self) -> bool:
        # Whether results may differ from SB3's in their last digits. Who gives optimiser settings gets them to the bit.
        given = self.policy_kwargs.keys() & {"optimizer_class", "optimizer_kwargs"}
        return not given or bool((self.policy_kwargs.get("optimizer_kwargs") or {}).get("fused"))

    def _loss_terms(self, data: TrainingData, minibatch: Any, epoch: Epoch, coefficients: Coefficients) -> LossTerms:
        samples = data.samples(minibatch)
        mask = self._padding_mask(samples)
        advantages = self._normalized_advantages(samples.advantages, mask, coefficients)
        # Where there are several parts, there is no mask: a family that has one is evaluated by methods of its own.
        parts = self._parts(samples.observations, (samples, advantages))
        return accumulated(
            (share, self._loss_terms_of_part(part, part_advantages, mask, epoch, coefficients))
            for share, (part, part_advantages) in parts
        )

    def _parts(self, observations: Any, columns: tuple[Any, ...]) -> Iterator[tuple[float, Any]]:
        """
        :param observations: of a minibatch
        :param columns: of the minibatch, all that is to be split
        :return: see :func:`~sb3_ppo_ewma._engine.parts.split`
        """
        if not (self._is_parted and type(self.rollout_buffer) in self._samples_classes):
            return iter([(1.0, columns)])
        if self._part_size is None:
            self._part_size = part_size(self._shortcuts[id(self.policy)], observations)
        some = next(iter(observations.values())) if isinstance(observations, dict) else observations
        return split(columns, len(some), self._part_size)

    def _loss_terms_of_part(
        self,
        samples: Any,
        advantages: th.Tensor,
        mask: th.Tensor | None,
        epoch: Epoch,
        coefficients: Coefficients,
    ) -> LossTerms:
        """
        :param samples: of the minibatch or a part of it
        :param advantages: (batch,) normalised
        :param mask: see :meth:`_padding_mask`
        """
        actions = forward.as_distributed(self.action_space, samples.actions)
        values, log_prob, entropy = self._evaluate_actions(self.policy, samples, actions)
        roots: list[th.Tensor] = []
        gradients: list[th.Tensor] = []
        weighted: list[th.Tensor] = []
        statistics: dict[str, th.Tensor] = {}

        def add(name: str, term: th.Tensor, coefficient: Coefficient | None) -> None:
            statistics[name] = detached = term.detach()
            if coefficient is not None:
                roots.append(term)
                gradients.append(th.ones_like(detached) * coefficient)
                weighted.append(detached * coefficient)

        if epoch.policy:
            # Before the proximal policy is evaluated: SB3's policies keep their last distribution only.
            current = torch_distributions(self.policy.action_dist, _ANALYTIC) if self._is_kl_analytic() else []
            policy = self._policy_loss_terms(samples, actions, advantages, log_prob.detach(), mask, coefficients)
            roots.append(log_prob)
            gradients.append(policy.gradient)
            weighted.append(policy.policy_gradient_loss + policy.kl_loss)
            statistics |= self._policy_statistics(policy, log_prob.detach() - samples.old_log_prob, mask)
            if current:
                kl = losses.analytic_kl(self._proximal_distributions(samples, actions), current)
                add("kl_loss", losses.masked_mean(kl, mask), coefficients.kl_coef)
            add("entropy_loss", losses.entropy_loss(entropy, log_prob, mask), coefficients.ent_coef)
        if epoch.value:
            value_loss = losses.value_loss(
                values.flatten(),
                samples.returns,
                old_values=samples.old_values,
                clip_range_vf=coefficients.clip_range_vf,
                mask=mask,
            )
            add("value_loss", value_loss, coefficients.vf_coef)
        statistics["loss"] = loss = th.stack(weighted).sum()
        return LossTerms(roots, gradients, loss, statistics)

    def _policy_statistics(
        self, policy: losses.PolicyLossTerms, log_ratio_old: th.Tensor, mask: th.Tensor | None
    ) -> dict[str, th.Tensor]:
        statistics = {
            "policy_gradient_loss": policy.policy_gradient_loss,
            "kl_loss": policy.kl_loss,
            "log_ratio_prox": losses.valid(policy.log_ratio_prox, mask),
            "log_ratio_behav": losses.valid(policy.log_ratio_behav, mask),
            "log_ratio_old": losses.valid(log_ratio_old, mask),
        }
        if self.target_kl is not None:
            statistics["approx_kl"] = losses.approximate_kl(statistics["log_ratio_old"])
        return statistics

    def _policy_loss_terms(
        self,
        samples: Any,
        actions: th.Tensor,
        advantages: th.Tensor,
        log_prob: th.Tensor,
        mask: th.Tensor | None,
        coefficients: Coefficients,
    ) -> losses.PolicyLossTerms:
        log_prob_prox = self._log_prob_prox(samples, actions)
        is_prox_behav = self.policy_ewma is None and self.staleness_mode == "proximal"
        return losses.policy_loss_terms(
            log_prob,
            log_prob_prox,
            log_prob_prox if is_prox_behav else self._log_prob_behav(samples, actions),
            advantages,
            coefficients.ratio_limits,
            kl_coef=None if self._is_kl_analytic() else coefficients.kl_coef,
            mask=mask,
        )

    def _log_prob_prox(self, samples: Any, actions: th.Tensor) -> th.Tensor:
        """
        :return: (batch,) log π_prox(a|s)
        """
        if self.policy_ewma is not None:
            return self._log_prob_of(self.policy_ewma, samples, actions)
        if self._is_stale and self.staleness_mode != "behavior":
            return self._log_prob_of(self._recent_policy, samples, actions)
        return cast(th.Tensor, samples.old_log_prob)

    def _log_prob_behav(self, samples: Any, actions: th.Tensor) -> th.Tensor:
        """
        :return: (batch,) log π_behav(a|s), or what takes its place in the mode ``"proximal"``
        """
        if self._is_stale and self.staleness_mode == "proximal":
            return self._log_prob_of(self._recent_policy, samples, actions)
        return cast(th.Tensor, samples.old_log_prob)

    @th.no_grad()
    def _log_prob_of(self, average: ParameterEwma | None, samples: Any, actions: th.Tensor) -> th.Tensor:
        return self._log_prob(cast(ActorCriticPolicy, cast(ParameterEwma, average).module), samples, actions)

    def _proximal_distributions(self, samples: Any, actions: th.Tensor) -> Sequence[Distribution]:
        average = self.policy_ewma if self.policy_ewma is not None else self._recent_policy
        if self.policy_ewma is None and not self._is_stale:
            # log π_prox came from the rollout; otherwise computing it has just left the distributions behind.
            self._log_prob_of(average, samples, actions)
        return torch_distributions(cast(Any, cast(ParameterEwma, average).module).action_dist, _ANALYTIC)

    def _is_kl_analytic(self) -> bool:
        return self.kl_coef > 0 and self.kl_estimator == "analytic"

    # ------------------------------------------------------------------ advantages

    def _update_advantage_moments(self, rollout: Rollout) -> float:
        """
        :return: standard deviation of the advantages, of this rollout or, with ``advantage_decay``, of the EWMA
        """
        advantages = rollout.buffer.advantages
        if self.advantage_moments is None:
            return float(advantages.std())
        if self.recompute_advantages:
            self._moments_before = copy.deepcopy(self.advantage_moments.state_dict())
        self._include_advantages(advantages)
        return math.sqrt(self.advantage_moments.moments()[1])

    def _include_advantages(self, advantages: np.ndarray) -> None:
        moments = cast(MomentsEwma, self.advantage_moments)
        if self._ranks is None:
            moments.update(th.as_tensor(advantages))
            return
        mean, squares, count = self._ranks.moments(th.as_tensor(advantages, dtype=th.float64).flatten())
        moments.update_from_moments(mean.item(), squares.item() / count, count)

    def _normalized_advantages(
        self, advantages: th.Tensor, mask: th.Tensor | None, coefficients: Coefficients
    ) -> th.Tensor:
        if not self.normalize_advantage:
            return advantages
        if coefficients.advantage_scale is not None:
            return standardize(advantages, *coefficients.advantage_scale)
        if self._ranks is None:
            return losses.normalize_advantages(advantages, mask)
        mean, squares, count = self._ranks.moments(losses.valid(advantages, mask))
        return advantages if count == 1 else standardize(advantages, mean, (squares / (count - 1)).sqrt() + 1e-8)

    @th.no_grad()
    def _recompute_advantages(self, rollout: Rollout) -> None:
        self.policy.set_training_mode(False)
        buffer = rollout.buffer
        size = buffer.buffer_size * buffer.n_envs
        step = max(EVALUATION_BATCH_SIZE, self.batch_size or size)
        values = th.cat([self._predict_values(buffer, slice(i, i + step)).flatten() for i in range(0, size, step)])
        rollout.replace_values(values.cpu().numpy(), self._predict_last_values(rollout))
        self.policy.set_training_mode(True)
        if self.advantage_moments is not None:
            # A rollout counts once, with its latest advantages.
            self.advantage_moments.load_state_dict(self._moments_before)
            self._include_advantages(buffer.advantages)

    # ------------------------------------------------------------------ schedules and logs

    def _current_coefficients(self) -> Coefficients:
        # Schedules may end slightly below 0 when the last rollout overshoots; only constants switch the clip off.
        clip_range = None if is_clip_off(self.clip_range) else self._scheduled("clip_range", self.clip_range)
        return Coefficients(
            losses.RatioLimits.of(clip_range, self.max_importance_ratio),
            None if self.clip_range_vf is None else self._scheduled("clip_range_vf", self.clip_range_vf),
            self.ent_coef or None,
            self.vf_coef,
            self.kl_coef or None,
            None if self.advantage_moments is None else self.advantage_moments.location_and_scale(),
        )

    def _scheduled(self, name: str, schedule: Schedule) -> float:
        value = schedule(self._current_progress_remaining)
        if not math.isfinite(value):
            raise ValueError(f"the schedule of {name} gives {value} at progress {self._current_progress_remaining:.3f}")
        return max(value, 0.0)

    def _update_learning_rate(self, optimizers: list[th.optim.Optimizer] | th.optim.Optimizer) -> None:
        learning_rate = self._scheduled("learning_rate", self.lr_schedule)
        self.logger.record("train/learning_rate", learning_rate)
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            update_learning_rate(optimizer, learning_rate)

    def _log_training(self, rollout: Rollout, advantage_std: float, statistics: TrainStatistics) -> None:
        record = self.logger.record
        coefficients = self._current_coefficients()
        for name in ("entropy_loss", "policy_gradient_loss", "value_loss"):
            record(f"train/{name}", np.mean(statistics.terms(name)))
        # SB3 logs the mean of the last epoch
        approx_kl = statistics.reduce(losses.approximate_kl, "log_ratio_old", last_epoch=True)
        record("train/approx_kl", np.mean(approx_kl))
        limits = coefficients.ratio_limits
        clip_fraction, approx_kl_prox, importance_ratio_max, cap_fraction, importance_ess = statistics.reduce(
            lambda prox, behav: th.stack(losses.ratio_statistics(prox, behav, limits)),
            "log_ratio_prox",
            "log_ratio_behav",
        )
        record("train/approx_kl_prox", np.mean(approx_kl_prox))
        record("train/loss", statistics.terms("loss")[-1])
        record("train/importance_ratio_max", np.max(importance_ratio_max))
        record("train/importance_ess", np.mean(importance_ess))
        if limits.log_cap is not None:
            record("train/importance_cap_fraction", np.mean(cap_fraction))
        if coefficients.kl_coef is not None:
            record("train/kl_loss", np.mean(statistics.terms("kl_loss")))
        record("train/advantage_std", advantage_std)
        if self.current_prox_decay is not None:
            record("train/prox_center_of_mass", center_of_mass_from_decay(self.current_prox_decay))
        buffer = rollout.buffer
        record("train/explained_variance", explained_variance(buffer.values.flatten(), buffer.returns.flatten()))
        if hasattr(self.policy, "log_std"):
            record("train/std", standard_deviation(self.policy).mean().item())
        record("train/n_updates", self._n_updates, exclude="tensorboard")
        if limits.high is not None:
            record("train/clip_fraction", np.mean(clip_fraction))
            record("train/clip_range", self._scheduled("clip_range", self.clip_range))
        if coefficients.clip_range_vf is not None:
            record("train/clip_range_vf", coefficients.clip_range_vf)

    # ------------------------------------------------------------------ learning, saving, loading

    def _setup_learn(self, *args: Any, **kwargs: Any) -> Any:
        # load() and attributes set by hand bypass the constructor.
        self._check_own_parameters()
        self._check_built_parameters()
        result = super()._setup_learn(*args, **kwargs)
        queue = self.stale_rollouts
        if queue is not None and len(queue) < min(self.staleness, self._n_rollouts):
            warn_caller(
                f"The queue of stale rollouts is not full: the next {queue.missing} rollouts are "
                "collected without training. To continue where training stopped, write it with save_replay_buffer() "
                "beside the model and read it with load_replay_buffer()."
            )
        return result

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_recent_policy", "_moments_before", *_PROCESS]


class PPOEWMA(EwmaMixin, PPO):
    """
    PPO-EWMA: Proximal Policy Optimization whose proximal policy is an exponentially weighted moving average.

    Paper: https://arxiv.org/abs/2110.00641 (Hilton, Cobbe, Schulman: Batch size-invariance for policy optimization)
    Code of the authors: https://github.com/openai/ppo-ewma

    All parameters of ``stable_baselines3.PPO`` in the same order with the same defaults; those of :class:`EwmaMixin` by
    keyword. With ``prox_decay=None`` it computes what SB3's PPO computes, as long as no ratio π_θ/π_behav reaches
    ``max_importance_ratio``: up to rounding, or to the bit if optimiser settings are given (SB3's are
    ``policy_kwargs={"optimizer_kwargs": {"eps": 1e-5}}``).

    >>> from sb3_ppo_ewma import PPOEWMA
    >>> model = PPOEWMA("MlpPolicy", "CartPole-v1", n_steps=64).learn(64)
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {**PPO.policy_aliases, "ImpalaPolicy": ImpalaPolicy}

    def learn(
        self: SelfPPOEWMA,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "PPOEWMA",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfPPOEWMA:
        """
        Train, as ``PPO.learn``.

        :param total_timesteps: number of environment steps
        :param callback: called at every step
        :param log_interval: iterations between logs
        :param tb_log_name: name of the run for tensorboard
        :param reset_num_timesteps: whether to count steps from 0
        :param progress_bar: show a progress bar
        :return: the model
        """
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)


def _constructor_parameters(inherited: Any, policy_kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**policy_kwargs, **inherited()}
