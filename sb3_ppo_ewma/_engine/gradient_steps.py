"""The gradient steps of one training: backward pass, clipped optimiser step, EWMA; and their statistics."""

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch as th
from torch import nn

from sb3_ppo_ewma._engine.compilation import CompiledSteps
from sb3_ppo_ewma._engine.flat_mlp import FlatMlp
from sb3_ppo_ewma._engine.optimizers import ClippedSteps, can_be_fused
from sb3_ppo_ewma._parallel.process_group import ProcessGroup
from sb3_ppo_ewma.ewma import ParameterEwma
from sb3_ppo_ewma.losses import LossTerms


class TrainStatistics:
    """Collects detached tensors of the minibatches of one training, which are read together."""

    def __init__(self) -> None:
        self._minibatches: list[dict[str, th.Tensor]] = []
        self._epoch_start = 0

    def begin_epoch(self) -> None:
        """What follows is another epoch."""
        self._epoch_start = len(self._minibatches)

    def add(self, statistics: dict[str, th.Tensor]) -> None:
        """
        :param statistics: of a minibatch, terms of shape () or rows of shape (batch,)
        """
        self._minibatches.append(statistics)

    def terms(self, name: str) -> np.ndarray:
        """
        :param name: of a term
        :return: its values in the minibatches that have it
        """
        values = [minibatch[name] for minibatch in self._minibatches if name in minibatch]
        return th.stack(values).cpu().double().numpy()

    def reduce(self, reduction: Callable[..., th.Tensor], *names: str, last_epoch: bool = False) -> np.ndarray:
        """
        :param reduction: of rows, (minibatches, batch) each, to (..., minibatches)
        :param names: of the rows
        :param last_epoch: leave out the epochs before the last
        :return: (..., minibatches)
        """
        groups = _groups(self._minibatches[self._epoch_start if last_epoch else 0 :], names[0])
        results = [reduction(*(th.stack([each[name] for each in group]) for name in names)) for group in groups]
        return th.cat(results, dim=-1).cpu().double().numpy()

    def condense(self, function: Callable[[dict[str, th.Tensor]], dict[str, th.Tensor]], names: Sequence[str]) -> None:
        """
        Replace rows of this epoch by terms.

        :param function: from rows of n minibatches of one size, (n, ...) each, to terms, (n,) each
        :param names: of the rows
        """
        minibatches = self._minibatches[self._epoch_start :]
        for group in _groups(minibatches, names[0]):
            rows = {name: th.stack([each.pop(name) for each in group]) for name in names if name in group[0]}
            for name, terms in function(rows).items():
                for minibatch, term in zip(group, terms.unbind(), strict=True):
                    minibatch[name] = term

    def check_finite(self, names: dict[str, str], when: str) -> None:
        """
        :param names: by key, what it says about a minibatch that this is NaN or Inf; the first one that is is named
        :param when: for the message
        :raises ValueError: if the step of a minibatch was not made
        """
        steps = [minibatch for minibatch in self._minibatches if "step" in minibatch]
        if not steps:
            return
        finite = th.isfinite(th.stack([step["step"] for step in steps])).cpu()
        if bool(finite.all()):
            return
        broken = steps[int((~finite).nonzero()[0])]
        found = (name for key, name in names.items() if key in broken and not bool(th.isfinite(broken[key]).all()))
        raise ValueError(
            f"NaN or Inf in {next(found, 'gradients')} {when}: the update was not made, the parameters are the last "
            "good ones. A smaller learning rate or max_grad_norm may help."
        )


def _groups(minibatches: list[dict[str, th.Tensor]], name: str) -> list[list[dict[str, th.Tensor]]]:
    """
    :return: those that have rows of this name, by their number of rows: the last minibatch may be smaller
    """
    groups: dict[int, list[dict[str, th.Tensor]]] = defaultdict(list)
    for minibatch in minibatches:
        if name in minibatch:
            groups[len(minibatch[name])].append(minibatch)
    return list(groups.values())


class GradientSteps:
    """
    Makes the steps of one training, in which nothing but parameters, optimisers and average changes.

    :param policy: whose parameters are trained
    :param average: EWMA of the policy
    :param max_grad_norm: largest norm of the gradient
    :param max_kl: largest approximate KL divergence at which a step is made, ``None``: any
    :param decay: of the EWMA
    :param may_fuse: whether steps of Adam may round differently from those of its ``step()``
    :param compiled: makes the steps as compiled graphs
    :param flat: the policy as one long vector, whose optimiser :meth:`step` is then to be given
    :param ranks: whose gradients are averaged; not of compiled steps
    """

    def __init__(
        self,
        policy: nn.Module,
        average: ParameterEwma | None,
        *,
        max_grad_norm: float,
        max_kl: float | None,
        decay: float | None,
        may_fuse: bool,
        compiled: CompiledSteps | None,
        flat: FlatMlp | None = None,
        ranks: ProcessGroup | None = None,
    ) -> None:
        self._policy, self._average = policy, average
        self._max_grad_norm, self._max_kl = max_grad_norm, math.inf if max_kl is None else max_kl
        self._decay = decay
        self._may_fuse = may_fuse
        self.compiled = compiled
        self._flat = flat
        self._ranks = ranks
        self._parameters = list(policy.parameters()) if flat is None else [flat.trained]
        self._optimizers: dict[int, ClippedSteps] = {}
        # The KL divergence that ended the training
        self.exceeded_kl: float | None = None

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Steps are made within this context."""
        with contextlib.ExitStack() as stack:
            if self._flat is not None:
                stack.callback(self._flat.write_back)
                stack.enter_context(th.no_grad())
            if self._average is not None:
                pairs = self._average.pairs(self._policy)
                pairs = pairs if self._flat is None else self._flat.replaced(pairs)
                stack.enter_context(self._average.updates_from(pairs))
            if self.compiled is not None:
                stack.enter_context(self.compiled.training())
            yield

    def step(
        self,
        loss_terms: Callable[..., LossTerms],
        minibatches: list[tuple[Any, ...]],
        optimizer: th.optim.Optimizer,
        statistics: TrainStatistics,
        updates_average: bool,
    ) -> bool:
        """
        The loss uses the EWMA before the step's own update.

        :param loss_terms: computes the losses of a minibatch
        :param minibatches: its arguments, for one minibatch or for several of one size, which become one graph
        :param optimizer: of the parameters
        :param statistics: to which those of the minibatches are added
        :param updates_average: whether each step moves the EWMA
        :return: False if the training ends here: the KL divergence is too large, or a step could not be made
        :raises CompilationError: if it cannot be compiled; then nothing has changed
        """
        average = self._average if updates_average else None
        if self.compiled is not None:
            results = self._compiled_steps(self.compiled, loss_terms, minibatches, optimizer, average)
            for values in results:
                statistics.add(values)
            made = all(not self._exceeds_max_kl(values) and _was_made(values["step"]) for values in results)
        else:
            made = all(self._step(loss_terms, each, optimizer, statistics, average) for each in minibatches)
        self._clipped_steps(optimizer).flush_moments(len(minibatches))
        return made

    def _step(
        self,
        loss_terms: Callable[..., LossTerms],
        arguments: tuple[Any, ...],
        optimizer: th.optim.Optimizer,
        statistics: TrainStatistics,
        average: ParameterEwma | None,
    ) -> bool:
        for parameter in self._parameters:
            parameter.grad = None
        terms = loss_terms(*arguments)
        statistics.add(terms.statistics)
        if self._exceeds_max_kl(terms.statistics):
            return False
        if terms.parameter_gradients is not None:
            for parameter, gradient in zip(self._parameters, terms.parameter_gradients, strict=True):
                parameter.grad = gradient
        elif terms.roots:
            th.autograd.backward(*terms.trained())
        terms.statistics["step"] = step = self._clipped_steps(optimizer).step(terms.loss)
        if not _was_made(step):
            return False
        if average is not None and self._decay is not None:
            average.update(self._policy, self._decay)
        return True

    def _compiled_steps(
        self,
        compiled: CompiledSteps,
        loss_terms: Callable[..., LossTerms],
        minibatches: list[tuple[Any, ...]],
        optimizer: th.optim.Optimizer,
        average: ParameterEwma | None,
    ) -> list[dict[str, th.Tensor]]:
        series = compiled.series(
            optimizer,
            max_grad_norm=self._max_grad_norm,
            max_kl=self._max_kl,
            average=average,
            source=self._policy,
            decay=self._decay or 0.0,
        )
        return compiled.step(series, loss_terms, minibatches)

    def _clipped_steps(self, optimizer: th.optim.Optimizer) -> ClippedSteps:
        if id(optimizer) not in self._optimizers:
            fused = self._may_fuse and can_be_fused(optimizer)
            self._optimizers[id(optimizer)] = ClippedSteps(
                optimizer, self._parameters, self._max_grad_norm, fused, self._ranks
            )
        return self._optimizers[id(optimizer)]

    def _exceeds_max_kl(self, statistics: dict[str, th.Tensor]) -> bool:
        # SB3 measures it against the behaviour policy. Against the EWMA, a refused step would never be caught up with.
        if "approx_kl" not in statistics:
            return False
        if self._ranks is not None:
            self._ranks.average([statistics["approx_kl"]])
        approx_kl = statistics["approx_kl"].item()
        if not approx_kl > self._max_kl:  # a NaN goes on, to be named
            return False
        self.exceeded_kl = approx_kl
        return True


def _was_made(step: th.Tensor) -> bool:
    # Without waiting for an accelerator, where training goes on with the next minibatch
    return step.device.type != "cpu" or math.isfinite(step)
