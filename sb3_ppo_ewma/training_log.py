"""
The statistics of one training, which are read from the device once it is over, and what is logged of them.

===================================  ==============================================================================
key                                  meaning
===================================  ==============================================================================
``train/policy_gradient_loss``       mean over minibatches of −(π_prox/π_behav)·min(r·Â, clip(r)·Â), r = π_θ/π_prox
``train/value_loss``                 mean over minibatches of (V − V_targ)²
``train/entropy_loss``               mean over minibatches of −H(π_θ), or of log π_θ(a|s) without a closed form
``train/kl_loss``                    mean over minibatches of β·KL(π_prox ‖ π_θ), with ``kl_coef`` > 0
``train/loss``                       the sum that is minimised, of the last minibatch
``train/approx_kl``                  SB3's estimate of KL(π_old ‖ π_θ), π_old the policy of the rollout; last epoch
``train/approx_kl_prox``             mean over minibatches of ½(log π_θ − log π_prox)²
``train/clip_fraction``              share of samples with r outside [1 − ε, 1 + ε]
``train/clip_range``                 ε
``train/clip_range_vf``              range of SB3's value clipping
``train/importance_ratio_max``       largest π_θ/π_behav
``train/importance_ess``             effective sample size of the importance weights, as a share of the minibatch
``train/importance_cap_fraction``    share of samples at the cap M
``train/advantage_std``              standard deviation that advantages are divided by, of the rollout without
                                     ``advantage_decay``
``train/prox_center_of_mass``        age of the EWMA in gradient steps
``train/explained_variance``         share of the variance of the returns that the values explain
``train/std``                        mean standard deviation of Gaussian actions
``train/learning_rate``              learning rate
``train/n_updates``                  policy epochs since the model was made
``aux/policy_kl``                    mean over minibatches of KL(π_old ‖ π_θ), π_old the policy before the phase
``aux/value_loss``                   mean over minibatches of (V − V_targ)²
``aux/aux_value_loss``               mean over minibatches of (V_aux − V_targ)²
``aux/learning_rate``                learning rate of the phase
``aux/n_phases``                     auxiliary phases so far
``aux/phase_progress``               share of the policy phase's rollouts that are stored
===================================  ==============================================================================
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th
from stable_baselines3.common.utils import explained_variance

from sb3_ppo_ewma._finite import broken_tensor, lost
from sb3_ppo_ewma.distributions import standard_deviation
from sb3_ppo_ewma.ewma import center_of_mass_from_decay
from sb3_ppo_ewma.losses import AuxiliaryLossStats
from sb3_ppo_ewma.rollouts import Rollout, is_finite

if TYPE_CHECKING:
    from sb3_ppo_ewma._engine.iteration import Iteration

# Whether the gradient step of a minibatch could be made: a number that is finite where it could
STEP = "step"
_FROM_OBSERVATIONS = "from observations with NaN or Inf, "
# Names for error messages, by the statistic that was not finite
BLAME = {
    "approx_kl": "log-probabilities",
    "value_loss": "values",
    "entropy_loss": "entropy",
    "policy_gradient_loss": "policy loss",
    "kl_loss": "KL penalty",
    "policy_kl": "KL divergence of the auxiliary phase",
    "aux_value_loss": "auxiliary values",
}


class TrainingStatistics:
    """Collects detached tensors of one training, which are read together when it is over."""

    def __init__(self) -> None:
        self._blocks: list[tuple[dict[str, th.Tensor], np.ndarray]] = []
        # Number of the epoch
        self.epoch = 0

    def begin_epoch(self) -> None:
        """Begin another epoch."""
        self.epoch += 1

    def add(self, statistics: dict[str, th.Tensor], epochs: Sequence[int] | None = None) -> None:
        """
        :param statistics: by name, scalars of a minibatch, shape (), or of n minibatches, (n,)
        :param epochs: epochs of the n minibatches; ``None``: one minibatch of the present epoch
        """
        self._blocks.append((statistics, np.array([self.epoch] if epochs is None else epochs)))

    def values(self, name: str, last_epoch: bool = False) -> np.ndarray:
        """
        :param name: name of a statistic
        :param last_epoch: leave out the epochs before the last
        :return: its values, one for each minibatch that has it
        """
        blocks = [(block[name].reshape(-1), epochs) for block, epochs in self._blocks if name in block]
        values: np.ndarray = th.cat([each for each, _ in blocks]).cpu().double().numpy()
        return values[np.concatenate([epochs for _, epochs in blocks]) == self.epoch] if last_epoch else values

    def __contains__(self, name: str) -> bool:
        """
        :param name: name of a statistic
        :return: whether a minibatch has it
        """
        return any(name in block for block, _ in self._blocks)

    def check_steps(self, names: Mapping[str, str], when: str, broken: str | None) -> None:
        """
        :param names: by statistic, what a NaN or Inf in it is called in the message; the first one found is named
        :param when: when it happened, for the message
        :param broken: the trained tensor that has a NaN or Inf now, from an earlier step, ``None``: all are finite
        :raises ValueError: if the gradient step of a minibatch was not made
        """
        if STEP not in self or bool(np.isfinite(self.values(STEP)).all()):
            return
        state = (
            "the parameters are finite and without it"
            if broken is None
            else f"but {broken} has NaN or Inf: load parameters that were saved earlier"
        )
        for block, _ in self._blocks:
            made = th.isfinite(block.get(STEP, th.zeros(()))).reshape(-1)
            if bool(made.all()):
                continue
            index = int((~made).nonzero()[0])
            found = (
                name
                for key, name in names.items()
                if key in block and not bool(th.isfinite(block[key].reshape(-1)[index]))
            )
            raise ValueError(
                f"NaN or Inf in {next(found, 'gradients')} {when}: the update was not made, {state}. "
                "A smaller learning rate or max_grad_norm may help."
            )


def check_result(model: Any, statistics: TrainingStatistics, found: str = "") -> None:
    """
    :param model: an algorithm that was trained
    :param statistics: statistics of the training
    :param found: what else is known of the cause, for the message
    :raises ValueError: if a gradient step could not be made, or left a NaN or Inf in what was trained
    """
    broken = broken_tensor(model)
    when = f"{found}after {model._n_updates} epochs and {model.num_timesteps} steps"
    statistics.check_steps(BLAME, when, broken)
    if broken is not None:
        raise lost(model, broken)


def log_training(model: Any, iteration: "Iteration", rollout: Rollout, advantage_std: float) -> None:
    """
    Log one training.

    :param model: the algorithm, for its logger and counters
    :param iteration: what the training worked with
    :param rollout: the rollout that was trained on
    :param advantage_std: from ``AdvantageNormalizer.include``
    :raises ValueError: if a gradient step of it could not be made, or left a NaN or Inf behind
    """
    record, statistics, coefficients = model.logger.record, iteration.statistics, iteration.coefficients
    check_result(model, statistics, "" if is_finite(rollout.buffer.observations) else _FROM_OBSERVATIONS)
    for name in ("entropy_loss", "policy_gradient_loss", "value_loss", "approx_kl_prox", "importance_ess"):
        record(f"train/{name}", np.mean(statistics.values(name)))
    # SB3 logs the mean of the last epoch
    record("train/approx_kl", np.mean(statistics.values("approx_kl", last_epoch=True)))
    record("train/loss", statistics.values("loss")[-1])
    record("train/importance_ratio_max", np.max(statistics.values("importance_ratio_max")))
    if coefficients.max_importance_ratio is not None:
        record("train/importance_cap_fraction", np.mean(statistics.values("importance_cap_fraction")))
    if "kl_loss" in statistics:
        record("train/kl_loss", np.mean(statistics.values("kl_loss")))
    record("train/advantage_std", advantage_std)
    if iteration.prox_decay is not None:
        record("train/prox_center_of_mass", center_of_mass_from_decay(iteration.prox_decay))
    buffer = rollout.buffer
    record("train/explained_variance", explained_variance(buffer.values.flatten(), buffer.returns.flatten()))
    if hasattr(iteration.policy, "log_std"):
        record("train/std", standard_deviation(iteration.policy).mean().item())
    record("train/n_updates", model._n_updates, exclude="tensorboard")
    if coefficients.clip_range is not None:
        record("train/clip_fraction", np.mean(statistics.values("clip_fraction")))
        record("train/clip_range", coefficients.clip_range)
    if coefficients.clip_range_vf is not None:
        record("train/clip_range_vf", coefficients.clip_range_vf)


def log_phase(model: Any, iteration: "Iteration", learning_rate: float) -> None:
    """
    Log one auxiliary phase.

    :param model: the algorithm, for its logger and counters
    :param iteration: what the phase worked with
    :param learning_rate: learning rate of the phase
    :raises ValueError: if a step of it could not be made, or left a NaN or Inf behind
    """
    statistics = iteration.statistics
    check_result(model, statistics)
    model.logger.record("aux/learning_rate", learning_rate)
    for name in AuxiliaryLossStats._fields:
        model.logger.record(f"aux/{name}", statistics.values(name).mean())
