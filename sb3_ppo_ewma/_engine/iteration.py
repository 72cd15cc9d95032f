"""What every engine works with: the objects and numbers of one training, and the protocol of engines."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, repeat
from typing import Any, NamedTuple, Protocol

import torch as th
from gymnasium import spaces

from sb3_ppo_ewma._arguments import is_clip_off, scheduled
from sb3_ppo_ewma._engine.recognition import patched_classes, replaced_method
from sb3_ppo_ewma.advantages import AdvantageNormalizer
from sb3_ppo_ewma.distributions import to_policy_actions
from sb3_ppo_ewma.evaluation import EVALUATION_BATCH_SIZE, Evaluation, Minibatch, PolicyEvaluation
from sb3_ppo_ewma.ewma import ParameterEwma
from sb3_ppo_ewma.losses import Coefficient
from sb3_ppo_ewma.policies import uncompiled
from sb3_ppo_ewma.rollouts import (
    BufferMinibatches,
    DeviceMinibatches,
    MinibatchSource,
    PhaseSamples,
    Rollout,
    device_minibatches,
)
from sb3_ppo_ewma.training_log import TrainingStatistics


class Objective(NamedTuple):
    """
    Which losses a gradient step minimises.

    :param policy: the policy loss with the entropy bonus and the KL penalty; each of its steps moves the EWMA
    :param value: the value loss
    """

    policy: bool
    value: bool


def objectives(model: Any) -> Iterable[Objective]:
    """
    :param model: the algorithm
    :return: the losses of each epoch of a training
    """
    if model.value_optimizer is None:
        return repeat(Objective(policy=True, value=True), model.n_epochs)
    value_epochs = repeat(Objective(policy=False, value=True), model.n_epochs_value)
    return chain(value_epochs, repeat(Objective(policy=True, value=False), model.n_epochs))


class Coefficients(NamedTuple):
    """
    Hyper-parameters of the loss, with the values that schedules have in this iteration.

    :param clip_range: ε, ``None``: no clip
    :param clip_range_vf: range of the value clipping in units of the return, ``None``: no clipping
    :param ent_coef: weight of the entropy
    :param vf_coef: weight of the value loss
    :param kl_coef: β, weight of the KL penalty
    :param max_importance_ratio: M, ``None``: no cap
    """

    clip_range: Coefficient | None
    clip_range_vf: Coefficient | None
    ent_coef: Coefficient
    vf_coef: Coefficient
    kl_coef: Coefficient
    max_importance_ratio: Coefficient | None


class AuxiliaryCoefficients(NamedTuple):
    """
    Hyper-parameters of the auxiliary phase's loss.

    :param beta_clone: β_clone, weight of the KL divergence from the policy before the phase
    :param vf_true_coef: c_vf, weight of the value function's loss
    :param vf_aux_coef: c_aux, weight of the auxiliary value head's loss
    """

    beta_clone: float
    vf_true_coef: float
    vf_aux_coef: float


class AuxiliaryMinibatch(NamedTuple):
    """
    Samples of the auxiliary phase, with the policy before it.

    :param samples: samples of the phase
    :param old_parameters: parameters of π_old's distributions, (batch, ...) each
    """

    samples: PhaseSamples
    old_parameters: list[th.Tensor]


class AuxiliaryEvaluation(NamedTuple):
    """
    A minibatch of the auxiliary phase under the policy, with gradient.

    :param kl: (batch,) KL(π_old ‖ π_θ)
    :param values: (batch,) V
    :param aux_values: (batch,) V_aux
    """

    kl: th.Tensor
    values: th.Tensor
    aux_values: th.Tensor


@dataclass
class Iteration:
    """
    The objects and numbers that one training works with. :meth:`read_settings` reads again what SB3 reads at every
    minibatch; the rest stays as it is while the training lasts.

    :param model: the algorithm
    :param policy: its policy
    :param evaluation: how its family evaluates it
    :param action_space: action space of the environment
    :param source: minibatches of the rollout
    :param batch_size: samples of a minibatch, ``None``: the whole rollout
    :param coefficients: hyper-parameters of the loss
    :param normalizer: of the advantages
    :param optimizer: optimiser of the steps that train the policy
    :param max_grad_norm: largest norm of the gradient
    :param value_optimizer: optimiser of the steps that train the value function alone
    :param average: EWMA of the policy's parameters, ``None`` without one
    :param prox_decay: decay of the EWMA
    :param prox: parameters of π_prox, ``None``: π_prox is the policy that collected
    :param behav: parameters of π_behav, ``None``: the policy that collected
    :param analytic_kl: whether the KL penalty is the divergence of the distributions, not an estimate
    :param max_kl: largest approximate KL divergence at which a step is made, ``None``: any
    :param extra_loss: the algorithm's further term of the loss, ``None`` without one
    :param process_group: processes that train together, ``None``: this one trains alone
    :param statistics: collects what is logged
    :param exceeded_kl: the KL divergence that ended the training, ``None``: none has
    """

    model: Any
    policy: Any
    evaluation: PolicyEvaluation
    action_space: spaces.Space[Any]
    source: MinibatchSource | None
    batch_size: int | None
    coefficients: Coefficients
    normalizer: AdvantageNormalizer
    optimizer: th.optim.Optimizer
    max_grad_norm: float
    value_optimizer: th.optim.Optimizer | None = None
    average: ParameterEwma | None = None
    prox_decay: float | None = None
    prox: ParameterEwma | None = None
    behav: ParameterEwma | None = None
    analytic_kl: bool = False
    max_kl: float | None = None
    extra_loss: Callable[[Evaluation, Minibatch], th.Tensor] | None = None
    process_group: Any = None
    statistics: TrainingStatistics = field(default_factory=TrainingStatistics)
    exceeded_kl: float | None = None

    def prepare(self, samples: Any) -> Minibatch:
        """
        :param samples: minibatch from the rollout buffer
        :return: actions as the distribution expects them, normalised advantages and the padding mask
        """
        mask = self.evaluation.padding_mask(samples)
        actions = to_policy_actions(self.action_space, samples.actions)
        return Minibatch(samples, actions, self.normalizer(samples.advantages, mask), mask)

    @th.no_grad()
    def recompute_advantages(self, rollout: Rollout) -> None:
        """
        :param rollout: the rollout, whose advantages and returns are computed anew with the current value function
        """
        self.policy.set_training_mode(False)
        buffer, predict = rollout.buffer, self.evaluation.predict_values
        size = buffer.buffer_size * buffer.n_envs
        step = max(EVALUATION_BATCH_SIZE, self.batch_size or size)
        values = [predict(self.policy, buffer, slice(i, i + step)).flatten() for i in range(0, size, step)]
        last_values = self.evaluation.predict_last_values(self.policy, rollout)
        rollout.replace_values(th.cat(values).cpu().numpy(), last_values)
        self.policy.set_training_mode(True)
        self.normalizer.include(buffer.advantages)
        self.source.update_targets()  # type: ignore[union-attr]  # there is one while a rollout is trained on

    def read_settings(self) -> None:
        """Read what SB3 reads at every minibatch from the algorithm again: code of the user may have changed it."""
        model = self.model
        self.coefficients = self.coefficients._replace(ent_coef=model.ent_coef, vf_coef=model.vf_coef)
        self.optimizer, self.value_optimizer = model.policy.optimizer, model.value_optimizer
        self.max_grad_norm, self.max_kl = model.max_grad_norm, _max_kl(model)
        self.normalizer.enabled = model.normalize_advantage

    def optimizer_of(self, objective: Objective) -> th.optim.Optimizer:
        """
        :param objective: losses of a step
        :return: the optimiser that makes it
        """
        return self.optimizer if objective.policy or self.value_optimizer is None else self.value_optimizer


class Engine(Protocol):
    """A way to make the gradient steps of a training. All give the numbers of the reference engine."""

    name: str

    def minibatches(self) -> Iterator[Any]:
        """
        :return: one epoch of minibatches for :meth:`step`
        """
        ...

    def step(self, minibatch: Any, objective: Objective) -> bool:
        """
        Make one gradient step, and add its statistics to the iteration's.

        :param minibatch: from :meth:`minibatches`
        :param objective: the losses to minimise
        :return: False if the training ends here: ``target_kl`` is exceeded, or loss or gradient are NaN or Inf
        """
        ...

    def auxiliary_step(
        self, minibatch: AuxiliaryMinibatch, optimizer: th.optim.Optimizer, coefficients: AuxiliaryCoefficients
    ) -> bool:
        """
        Make one gradient step of the auxiliary phase.

        :param minibatch: samples of the phase
        :param optimizer: optimiser of the phase
        :param coefficients: hyper-parameters of its loss
        :return: False if the phase ends here: loss or gradient are NaN or Inf
        """
        ...

    def old_parameters(self, samples: PhaseSamples) -> list[th.Tensor]:
        """
        :param samples: samples of the auxiliary phase
        :return: parameters of the policy's distributions for them, which :meth:`auxiliary_step` takes as π_old's
        """
        ...

    def end_epoch(self) -> None:
        """Called after every epoch."""
        ...

    def synchronize(self) -> None:
        """
        Put everything back into policy, EWMA, optimisers and statistics. Called when training ends or pauses, after
        :meth:`end_epoch`.
        """
        ...


def make_iteration(model: Any, rollout: Rollout | None) -> Iteration:
    """
    :param model: the algorithm
    :param rollout: the rollout to train on, ``None`` where nothing is trained
    :return: what the training works with
    """
    is_analytic = model.kl_coef > 0 and model.kl_estimator == "analytic"
    is_recent_behav = model._is_stale and model.staleness_mode == "proximal"
    is_recent_prox = is_analytic or (model._is_stale and model.staleness_mode != "behavior")
    is_recent_prox = is_recent_prox and model.policy_ewma is None
    # Policy at the start of the iteration
    needs_recent = rollout is not None and (is_recent_prox or is_recent_behav)
    recent = ParameterEwma(uncompiled(model.policy)) if needs_recent else None
    process_group = None if model._data_parallel is None else model._data_parallel.group
    return Iteration(
        model=model,
        policy=model.policy,
        evaluation=model.policy_evaluation,
        action_space=model.action_space,
        source=None if rollout is None else _minibatch_source(model, rollout),
        batch_size=model.batch_size,
        coefficients=_coefficients(model, is_scheduled=rollout is not None),
        normalizer=AdvantageNormalizer(model.normalize_advantage, model.advantage_moments, process_group),
        optimizer=model.policy.optimizer,
        max_grad_norm=model.max_grad_norm,
        value_optimizer=model.value_optimizer,
        average=model.policy_ewma,
        prox_decay=model.current_prox_decay,
        prox=model.policy_ewma if model.policy_ewma is not None else recent if is_recent_prox else None,
        behav=recent if is_recent_behav else None,
        analytic_kl=is_analytic,
        max_kl=_max_kl(model),
        extra_loss=model.extra_loss,
        process_group=process_group,
    )


def _minibatch_source(model: Any, rollout: Rollout) -> MinibatchSource:
    buffer = rollout.buffer
    # A buffer that is not full is refused by its own get().
    if model.engine == "reference" or unknown_buffer(model, buffer) is not None or not buffer.full:
        return BufferMinibatches(buffer)
    # Processes that train together must all make the same exchanges: none falls back alone.
    make = device_minibatches if model._data_parallel is None else DeviceMinibatches
    return make(buffer, model.samples_classes[type(buffer)])


def unknown_buffer(model: Any, buffer: Any) -> str | None:
    """
    :param model: the algorithm
    :param buffer: its rollout buffer
    :return: why its minibatches cannot be gathered on the device, ``None`` if they can
    """
    if type(buffer) not in model.samples_classes:
        return f"the rollout buffer is a {type(buffer).__name__}"
    replaced = replaced_method(buffer)
    if replaced is not None:
        return f"{replaced} of the rollout buffer was replaced"
    targets = (buffer.values, buffer.log_probs, buffer.advantages, buffer.returns)
    dtypes = {th.from_numpy(target).dtype for target in targets}
    if dtypes != {next(model.policy.parameters()).dtype}:
        return "the rollout buffer has another dtype than the policy"
    return patched_classes()


def _coefficients(model: Any, is_scheduled: bool) -> Coefficients:
    """
    :param model: the algorithm
    :param is_scheduled: whether to ask the schedules, which may count how often they are asked
    :return: hyper-parameters of the loss
    """
    # Schedules may end slightly below 0 when the last rollout overshoots; only constants switch the clip off.
    has_clip, has_value_clip = not is_clip_off(model.clip_range), model.clip_range_vf is not None
    return Coefficients(
        scheduled(model, "clip_range", model.clip_range) if is_scheduled and has_clip else None,
        scheduled(model, "clip_range_vf", model.clip_range_vf) if is_scheduled and has_value_clip else None,
        model.ent_coef,
        model.vf_coef,
        model.kl_coef,
        model.max_importance_ratio,
    )


def _max_kl(model: Any) -> float | None:
    return None if model.target_kl is None else 1.5 * model.target_kl
