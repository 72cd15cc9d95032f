"""
The gradient noise scale: how many samples a batch has when the noise of its gradient is as large as the gradient.

Source: McCandlish, Kaplan, Amodei 2018, https://arxiv.org/abs/1812.06162
"""

import contextlib
import copy
import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, cast

import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback

from sb3_ppo_ewma._arguments import check_integer, check_number
from sb3_ppo_ewma._engine.iteration import Iteration, Objective, make_iteration, objectives
from sb3_ppo_ewma._engine.reference import ReferenceEngine
from sb3_ppo_ewma.advantages import AdvantageNormalizer, MomentsEwma
from sb3_ppo_ewma.checkpointing.generators import preserved_generators
from sb3_ppo_ewma.following import follow_policy
from sb3_ppo_ewma.ppo_ewma import EwmaMixin
from sb3_ppo_ewma.rollouts import Rollout

# What a logger has collected for its next dump
_RECORDS = ("name_to_value", "name_to_count", "name_to_excluded")
# By name in the log
_LOSSES = {
    "joint": Objective(policy=True, value=True),
    "policy": Objective(policy=True, value=False),
    "value": Objective(policy=False, value=True),
}


class NoiseEstimate(NamedTuple):
    """
    What the noise scale is made of.

    :param squared_norm: |G|², of the expected gradient; an estimate can be negative
    :param trace: tr Σ, of the covariance of the gradients of single samples
    """

    squared_norm: float
    trace: float

    @property
    def noise_scale(self) -> float | None:
        """
        :return: B = tr Σ/|G|² in samples; ``None`` where the estimate of |G|² is not positive
        """
        return self.trace / self.squared_norm if self.squared_norm > 0 else None


def estimate_noise(gradients: Iterable[th.Tensor], batch_size: int) -> NoiseEstimate:
    """
    Estimates from the gradients g_i of m disjoint batches of b samples, unbiased where samples are independent::

        ḡ = Σ g_i/m,    tr Σ ≈ b·Σ|g_i − ḡ|²/(m − 1),    |G|² ≈ |ḡ|² − tr Σ/(m·b)

    They are those of the source with B_small = b and B_big = m·b.

    Source: McCandlish et al. 2018, appendix A.1.

    :param gradients: m ≥ 2 vectors of shape (n_parameters,), taken one after the other
    :param batch_size: b ≥ 1
    :return: the estimates
    :raises ValueError: if there are fewer than 2 gradients
    """
    n, mean, squared_deviations = 0, th.zeros(()), 0.0
    for n, gradient in enumerate(gradients, 1):
        # Welford's update: one vector is kept, and nothing cancels
        mean = mean.to(gradient)
        deviation = gradient - mean
        mean = mean + deviation / n
        squared_deviations += deviation.dot(gradient - mean).item()
    if n < 2:
        raise ValueError(f"gradients must be at least 2, got {n}")
    trace = batch_size * squared_deviations / (n - 1)
    return NoiseEstimate(mean.dot(mean).item() - trace / (n * batch_size), trace)


class NoiseScaleCallback(BaseCallback):
    """
    Logs the gradient noise scale B = tr Σ/|G|² of the losses of an algorithm of this package, in samples:
    ``noise_scale/policy``, ``noise_scale/value`` and, where both are minimised together, that of their sum,
    ``noise_scale/joint``. Minibatches far smaller than B average noise, so that twice the batch is worth almost twice
    the step; from minibatches far larger than B there is little to gain (the critical batch size).

    It is measured before training, on the rollout just collected (with staleness, too, although that one is trained on
    later), with the parameters, the EWMA and the advantages' moments that the first gradient step would find; without
    ``advantage_decay``, advantages are normalised over the rollout. Gradients are not clipped. This takes about as long
    as one epoch for each of the losses, and does not change training, to the bit on a CPU.

    Take B as an order of magnitude: it is that of plain gradient descent, not of Adam; one policy epoch is assumed; and
    the samples of a rollout are correlated, which makes B too small. While |G|² cannot be told from 0, nothing is
    logged: larger rollouts or a larger ``decay`` help.

    Source: McCandlish, Kaplan, Amodei 2018, https://arxiv.org/abs/1812.06162

    >>> from sb3_ppo_ewma import PPOEWMA, NoiseScaleCallback
    >>> callback = NoiseScaleCallback(n_batches=8)
    >>> model = PPOEWMA("MlpPolicy", "CartPole-v1", n_steps=64).learn(128, callback)
    >>> list(callback.estimates)
    ['joint', 'policy', 'value']

    :param n_batches: m ≥ 2, number of batches into which a rollout is divided, of ⌊n_steps·n_envs/m⌋ samples each
    :param every: number of iterations from one measurement to the next
    :param decay: d in [0, 1) of the debiased EWMA, over measurements, of tr Σ and of |G|²; 0: the last one only
    :raises TypeError: for a value of the wrong type; before training, if the algorithm is not one of this package
    :raises ValueError: for a value out of its range; before training, if a rollout has fewer than m samples
    """

    rank_0_only = True  # it changes nothing but the log

    def __init__(self, n_batches: int = 16, every: int = 1, decay: float = 0.9) -> None:
        super().__init__()
        check_integer("n_batches", n_batches, minimum=2)
        check_integer("every", every, minimum=1)
        check_number("decay", decay, 0, 1)
        self.n_batches, self.every, self.decay = n_batches, every, decay
        # Averages over measurements, by name of the loss
        self.estimates: dict[str, NoiseEstimate] = {}
        self._weights: dict[str, float] = {}

    def _init_callback(self) -> None:
        model = self.model
        if not isinstance(model, EwmaMixin):
            raise TypeError(f"NoiseScaleCallback needs an algorithm of sb3_ppo_ewma, got {type(model).__name__}")
        n_samples = _n_samples(model.rollout_buffer)
        if self.n_batches > n_samples:
            raise ValueError(
                f"n_batches must be at most the number of samples in a rollout, n_steps·n_envs = {n_samples}, "
                f"got {self.n_batches}"
            )

    def _on_training_start(self) -> None:
        if self.model.num_timesteps == 0:  # another run
            self.estimates, self._weights = {}, {}

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        model = cast(EwmaMixin, self.model)
        if model._n_rollouts % self.every != 0:
            return
        rollout = model.policy_evaluation.collected_rollout(model)
        try:
            rollout.check_finite()
        except ValueError:
            return  # train() says what is wrong
        for name, estimate in self._measure(model, rollout).items():
            if all(map(math.isfinite, estimate)):
                self._add(name, estimate)
        for name, average in self.estimates.items():
            if average.noise_scale is not None:
                self.logger.record(f"noise_scale/{name}", average.noise_scale)

    def _add(self, name: str, estimate: NoiseEstimate) -> None:
        self._weights[name] = weight = self.decay * self._weights.get(name, 0.0) + 1
        pairs = zip(self.estimates.get(name, estimate), estimate, strict=True)
        self.estimates[name] = NoiseEstimate(*(average + (new - average) / weight for average, new in pairs))

    def _measure(self, model: EwmaMixin, rollout: Rollout) -> dict[str, NoiseEstimate]:
        """
        :param model: in the state in which it comes to training
        :param rollout: which it has just collected
        :return: estimates by name of the loss
        """
        with _unchanged(model):
            model._update_current_progress_remaining(model.num_timesteps, model._total_timesteps)
            follow_policy(model)
            model.policy.set_training_mode(True)
            iteration = make_iteration(model, dataclasses.replace(rollout, buffer=_scratch(rollout.buffer)))
            iteration.batch_size = _n_samples(rollout.buffer) // self.n_batches
            iteration.normalizer = _normalizer_of(rollout.buffer, model)
            gradients = {
                name: _gradients(iteration, objective)
                for name, objective in _LOSSES.items()
                if name != "joint" or objective in objectives(model)
            }
            return {
                name: estimate_noise(itertools.islice(each, self.n_batches), iteration.batch_size)
                for name, each in gradients.items()
            }


def _n_samples(buffer: RolloutBuffer) -> int:
    return buffer.buffer_size * buffer.n_envs


def _gradients(iteration: Iteration, objective: Objective) -> Iterator[th.Tensor]:
    """
    :param iteration: what the coming training works with
    :param objective: the losses
    :return: gradients of disjoint batches, (n_parameters,) each
    """
    engine = ReferenceEngine(iteration)
    parameters = [parameter for parameter in iteration.policy.parameters() if parameter.requires_grad]
    for samples in engine.minibatches():
        minibatch = iteration.prepare(samples)
        evaluation = engine.evaluate(minibatch, objective)
        loss, _ = engine.loss(evaluation, minibatch, objective, iteration.coefficients)
        # That of frozen networks has no graph.
        found: Any = [None] * len(parameters)
        if loss.requires_grad:
            found = th.autograd.grad(loss, parameters, allow_unused=True)
        yield th.cat([(th.zeros_like(p) if g is None else g).flatten() for g, p in zip(found, parameters, strict=True)])


def _normalizer_of(buffer: RolloutBuffer, model: EwmaMixin) -> AdvantageNormalizer:
    """
    :param buffer: a rollout that does not count yet in the advantages' moments
    :param model: the algorithm, whose moments stay as they are
    :return: normaliser with moments that include the rollout. All batches have one location and scale: normalised each
        by itself, small ones would have another expected gradient than large ones
    """
    moments = MomentsEwma(decay=0) if model.advantage_moments is None else copy.deepcopy(model.advantage_moments)
    moments.update(th.as_tensor(buffer.advantages))
    return AdvantageNormalizer(model.normalize_advantage, moments)


def _scratch(buffer: RolloutBuffer) -> RolloutBuffer:
    """
    :param buffer: filled rollout buffer
    :return: one of the same arrays, which can be flattened without this one; its ``get()`` replaces arrays, in the
        buffer and in a dictionary of observations
    """
    scratch: Any = copy.copy(buffer)
    if isinstance(scratch.observations, dict):
        scratch.observations = dict(scratch.observations)
    return cast(RolloutBuffer, scratch)


@contextlib.contextmanager
def _unchanged(model: EwmaMixin) -> Iterator[None]:
    """
    Losses can be differentiated within this context, and training finds what it would have found.

    :param model: the algorithm, whose running statistics, mode, progress and generators are put back
    """
    policy = model.policy
    buffers = [buffer.clone() for buffer in policy.buffers()]
    was_training, progress = policy.training, model._current_progress_remaining
    records = {name: dict(getattr(model.logger, name)) for name in _RECORDS}
    try:
        with preserved_generators(model.device):
            yield
    finally:
        model._current_progress_remaining = progress
        for name, record in records.items():
            getattr(model.logger, name).clear()
            getattr(model.logger, name).update(record)
        policy.set_training_mode(was_training)
        with th.no_grad():
            for buffer, before in zip(policy.buffers(), buffers, strict=True):
                buffer.copy_(before)
