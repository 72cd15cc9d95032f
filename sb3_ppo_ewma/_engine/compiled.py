"""Whole gradient steps as compiled graphs: losses, backward pass, clipping, Adam and EWMA."""

import copy
import functools
import math
import threading
import types
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import torch as th
from torch import nn

from sb3_ppo_ewma._engine.dense import DenseEngine
from sb3_ppo_ewma._engine.fused import adam_state
from sb3_ppo_ewma._engine.iteration import (
    AuxiliaryCoefficients,
    AuxiliaryMinibatch,
    Coefficients,
    Iteration,
    Objective,
)
from sb3_ppo_ewma._engine.reference import is_on
from sb3_ppo_ewma._engine.standard import StandardEngine, StandardPolicy
from sb3_ppo_ewma.distributions import Parameters
from sb3_ppo_ewma.ewma import ParameterEwma
from sb3_ppo_ewma.training_log import STEP

# Number of dense steps in one graph: they are so small that calling it takes longer
_UNROLLED = 4
# For how many steps the numbers are prepared at once
_PREPARED = 64
# The one objective of dense engines
_JOINT = Objective(policy=True, value=True)
# Torch has settings that graphs need for itself, which are those of all threads.
_CALLING = threading.RLock()

# From the arguments of a minibatch to the loss, or a number that is finite if the loss is; statistics; derivatives
GradientFunction = Callable[..., tuple[th.Tensor, dict[str, th.Tensor], Sequence[th.Tensor | None]]]


class CompilationError(Exception):
    """Says why a step has to be made without a graph."""


class Adam(NamedTuple):
    """
    The tensors and constants of an Adam optimiser in a graph.

    :param parameters: all parameters it optimises
    :param exp_avgs: their first moments
    :param exp_avg_sqs: their second moments
    :param betas: decays of the moments
    :param eps: added to the denominator
    :param weight_decay: weight decay of the parameters
    """

    parameters: list[th.Tensor]
    exp_avgs: list[th.Tensor]
    exp_avg_sqs: list[th.Tensor]
    betas: tuple[float, float]
    eps: float
    weight_decay: float


class StepNumbers:
    """
    What differs from step to step, as the positions of numbers in a tensor, so that no graph depends on their values.
    Behind these come, for each parameter, Adam's step size, learning rate / (1 − β₁ᵗ), and the divisor of the root of
    its second moment, √(1 − β₂ᵗ).
    """

    MAX_GRAD_NORM = 0
    MAX_KL = 1  # largest approximate KL divergence at which the step is made
    INTERPOLATION = 2  # weight of the new parameters in the EWMA
    N = 3


def _gradient_steps(
    gradient: GradientFunction,
    minibatches: list[tuple[Any, ...]],
    adam: Adam,
    averages: list[th.Tensor],
    averaged: list[th.Tensor],
    numbers: list[th.Tensor],
) -> tuple[list[dict[str, th.Tensor]], th.Tensor, list[bool]]:
    """
    :param gradient: computes the gradient of a minibatch
    :param minibatches: its arguments, for each minibatch
    :param adam: the optimiser
    :param averages: tensors of an EWMA, none without one
    :param averaged: the parameters that they average
    :param numbers: those of each step, see :class:`StepNumbers`
    :return: statistics of the minibatches, of which ``STEP`` is NaN or Inf where gradient or loss are; how many steps
        were made, until the first that was not; for each parameter whether it had a gradient
    """
    statistics: list[dict[str, th.Tensor]] = []
    all_made: list[th.Tensor] = []
    has_gradient: list[bool] = []
    for arguments, of_step in zip(minibatches, numbers, strict=True):
        loss, values, gradients = gradient(*arguments)
        has_gradient = [each is not None for each in gradients]
        goes_on = all_made[-1] if all_made else None
        step, made = _update(gradients, loss, values.get("approx_kl"), goes_on, adam, averages, averaged, of_step)
        statistics.append({**values, STEP: step})
        all_made.append(made)
    return statistics, th.stack(all_made).sum(), has_gradient


def _local_gradient(
    gradient: GradientFunction, arguments: tuple[Any, ...]
) -> tuple[th.Tensor, dict[str, th.Tensor], list[bool]]:
    """
    :param gradient: computes the gradient of a minibatch
    :param arguments: its arguments
    :return: what processes add up: the gradient, the loss, and the approximate KL divergence if there is one, in one
        tensor; statistics of the minibatch; for each parameter whether it has a gradient
    """
    loss, values, gradients = gradient(*arguments)
    parts = [*(each for each in gradients if each is not None), loss]
    parts += [values["approx_kl"]] if "approx_kl" in values else []
    return th.cat([each.reshape(-1) for each in parts]), values, [each is not None for each in gradients]


def _shared_step(
    total: th.Tensor,
    values: dict[str, th.Tensor],
    has_gradient: list[bool],
    n_processes: int,
    adam: Adam,
    averages: list[th.Tensor],
    averaged: list[th.Tensor],
    numbers: th.Tensor,
) -> tuple[dict[str, th.Tensor], th.Tensor]:
    """
    :param total: sum of what the processes have from :func:`_local_gradient`
    :param values: statistics of this process's minibatch
    :param has_gradient: for each parameter whether it has a gradient
    :param n_processes: number of processes
    :param adam: the optimiser
    :param averages: tensors of an EWMA, none without one
    :param averaged: the parameters that they average
    :param numbers: those of the step, see :class:`StepNumbers`
    :return: statistics of the minibatch, with the mean KL divergence of the processes; whether the step was made
    """
    trained = [each for each, has in zip(adam.parameters, has_gradient, strict=True) if has]
    sizes = [*(each.numel() for each in trained), 2 if "approx_kl" in values else 1]
    *parts, others = th.split_with_sizes(total / n_processes, sizes)
    found = iter([part.view(each.shape) for part, each in zip(parts, trained, strict=True)])
    gradients = [next(found) if has else None for has in has_gradient]
    approx_kl = others[1] if "approx_kl" in values else None
    step, made = _update(gradients, others[0], approx_kl, None, adam, averages, averaged, numbers)
    return {**values, **({} if approx_kl is None else {"approx_kl": approx_kl}), STEP: step}, made


@th.no_grad()
def _update(
    gradients: Sequence[th.Tensor | None],
    loss: th.Tensor,
    approx_kl: th.Tensor | None,
    goes_on: th.Tensor | None,
    adam: Adam,
    averages: list[th.Tensor],
    averaged: list[th.Tensor],
    numbers: th.Tensor,
) -> tuple[th.Tensor, th.Tensor]:
    """
    :param gradients: of the optimiser's parameters
    :param loss: a number that is finite if the loss is
    :param approx_kl: approximate KL divergence, ``None``: it is not limited
    :param goes_on: whether the step before was made, ``None``: there is none
    :param adam: the optimiser
    :param averages: tensors of an EWMA, none without one
    :param averaged: the parameters that they average
    :param numbers: those of the step, see :class:`StepNumbers`
    :return: norm of the gradient plus loss; whether the step was made
    """
    norm = th.stack([each.square().sum() for each in gradients if each is not None]).sum().sqrt()
    step = norm + loss
    made = th.isfinite(step)
    if approx_kl is not None:
        made = made & ~(approx_kl > numbers[StepNumbers.MAX_KL])
    if goes_on is not None:
        made = made & goes_on
    one = made.to(norm.dtype)  # or 0, which leaves everything as it is
    factor = th.clamp(numbers[StepNumbers.MAX_GRAD_NORM] / (norm + 1e-6), max=1.0)
    clipped = [None if each is None else th.where(made, each * factor, 0.0) for each in gradients]
    _adam_step(adam, clipped, one, numbers)
    for average, parameter in zip(averages, averaged, strict=True):
        average.lerp_(parameter, (one * numbers[StepNumbers.INTERPOLATION]).to(average.dtype))
    return step, made


def _adam_step(adam: Adam, gradients: list[th.Tensor | None], one: th.Tensor, numbers: th.Tensor) -> None:
    """
    :param adam: the optimiser
    :param gradients: clipped gradients of its parameters
    :param one: 1, or 0 where the step is not to be made
    :param numbers: those of the step, see :class:`StepNumbers`
    """
    step_sizes, divisors = numbers[StepNumbers.N :].chunk(2)
    beta1, beta2 = adam.betas
    for i, gradient in enumerate(gradients):
        if gradient is None:
            continue
        parameter, exp_avg, exp_avg_sq = adam.parameters[i], adam.exp_avgs[i], adam.exp_avg_sqs[i]
        decayed = gradient + one * adam.weight_decay * parameter if adam.weight_decay else gradient
        exp_avg.lerp_(decayed, (1 - beta1) * one)
        exp_avg_sq.mul_(1 - (1 - beta2) * one).add_((1 - beta2) * decayed * decayed)
        parameter.sub_(one * step_sizes[i] * (exp_avg / (exp_avg_sq.sqrt() / divisors[i] + adam.eps)))


class Graphs:
    """
    The compiled graphs of one model, one for each shape of minibatch. They belong to a process, and one thread at a
    time calls graphs of any model.

    :param mode: mode of ``torch.compile``, ``None``: its default
    :raises CompilationError: if this version of torch cannot trace a backward pass
    """

    # Why training goes on without them
    failure: str | None = None
    # Number of steps made
    n_steps = 0

    def __init__(self, mode: str | None) -> None:
        from torch import _dynamo  # takes seconds, and only here

        self.mode = mode
        if not hasattr(_dynamo.config, "trace_autograd_ops"):
            raise CompilationError(f"torch {th.__version__} cannot compile a backward pass together with the optimizer")
        self._dynamo = _dynamo
        options: dict[str, Any] | None = None
        if mode is None:
            # Fewer of the wrapper's own operations between the kernels, which are small
            options = {"cpp_wrapper": True, "size_asserts": False, "fallback_random": True}
        # Functions of its own: torch limits the number of graphs of one.
        self._steps, self._gradient, self._shared_step = (
            th.compile(_copied(each), fullgraph=True, dynamic=False, mode=mode, options=options)
            for each in (_gradient_steps, _local_gradient, _shared_step)
        )
        # With CUDA graphs, the next step writes its results where those of the last one are.
        self._copies = mode in ("reduce-overhead", "max-autotune")

    @classmethod
    def failed(cls, mode: str | None, reason: str) -> "Graphs":
        """
        :param mode: mode of ``torch.compile``
        :param reason: why there can be none
        :return: no graphs
        """
        graphs = cls.__new__(cls)
        graphs.mode, graphs.failure = mode, reason
        return graphs

    def __call__(
        self,
        gradient: GradientFunction,
        minibatches: list[tuple[Any, ...]],
        series: "StepSeries",
        is_checked: bool,
        process_group: Any = None,
    ) -> list[dict[str, th.Tensor]]:
        """
        Make some steps as one graph, or as two with an exchange between them. If they cannot be compiled, nothing has
        changed.

        :param gradient: computes the gradient of a minibatch
        :param minibatches: its arguments, for each minibatch; all of one size, and a single one with a process group
        :param series: the steps of an optimiser in this training
        :param is_checked: whether such minibatches were seen in this training before. That nothing changes need not be
            checked again at every step, only which of the graphs it is
        :param process_group: processes that train together, ``None``: this one trains alone
        :return: statistics of the minibatches, of which ``STEP`` is NaN or Inf where gradient or loss are
        :raises CompilationError: if it cannot be compiled, in any of the processes
        """
        numbers = series.numbers(len(minibatches))
        if process_group is None:
            steps = self._steps, gradient, minibatches, *series.tensors, numbers
            statistics, n_made, has_gradient = self._call(is_checked, *steps)
        else:
            ((arguments,), (of_step,)) = minibatches, numbers
            total, values, has_gradient = self._local_gradient(gradient, arguments, series, is_checked, process_group)
            process_group.add_up(total)
            step = total, values, has_gradient, process_group.size, *series.tensors, of_step
            own, n_made = self._call(is_checked, self._shared_step, *step)
            statistics = [own]
        self.n_steps += len(minibatches)
        # Without a limit of the KL divergence, only a step that ends the training with an error is not made: to ask an
        # accelerator would be to wait for it.
        asks = n_made.device.type == "cpu" or math.isfinite(series.max_kl)
        series.count(int(n_made) if asks else len(minibatches), has_gradient)
        if self._copies:
            statistics = [{name: value.clone() for name, value in each.items()} for each in statistics]
        return cast(list[dict[str, th.Tensor]], statistics)

    def _local_gradient(
        self,
        gradient: GradientFunction,
        arguments: tuple[Any, ...],
        series: "StepSeries",
        is_checked: bool,
        process_group: Any,
    ) -> tuple[th.Tensor, dict[str, th.Tensor], list[bool]]:
        """
        :return: from :func:`_local_gradient`, once all processes have both graphs: if one trained on without them, it
            would make other exchanges than the others
        """
        result: tuple[th.Tensor, dict[str, th.Tensor], list[bool]]
        if is_checked:
            result = self._call(True, self._gradient, gradient, arguments)
            return result
        reason = None
        try:
            result = total, *others = self._call(False, self._gradient, gradient, arguments)
            (of_step,) = series.numbers(1)
            not_made = th.full_like(total, math.nan)
            self._call(False, self._shared_step, not_made, *others, process_group.size, *series.tensors, of_step)
        except CompilationError as error:
            reason = str(error)
        for rank, each in enumerate(process_group.gather(reason)):
            if each is not None:
                raise CompilationError(each if rank == process_group.rank else f"{each} (in rank {rank})")
        return result

    def _call(self, is_checked: bool, function: Callable[..., Any], *args: Any) -> Any:
        with _CALLING:
            context: Any = (
                th.compiler.set_stance("default", skip_guard_eval_unsafe=True) if is_checked else _tracing_gradients()
            )
            try:
                with context:
                    return function(*args)
            except (self._dynamo.exc.TorchDynamoException, self._dynamo.exc.FailOnRecompileLimitHit) as error:
                raise CompilationError(str(error).strip().partition("\n")[0]) from error


@functools.cache  # each one leaves a context variable
def _tracing_gradients() -> Any:
    from torch import _dynamo

    return _dynamo.config.patch(trace_autograd_ops=True)


def _copied(function: Any) -> Any:
    return types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)


class StepSeries:
    """
    The steps of an optimiser in one training, all of which move the EWMA or none.

    :param optimizer: an ordinary Adam with one group of parameters
    :param max_grad_norm: largest norm of the gradient
    :param max_kl: largest approximate KL divergence at which a step is made
    :param average: EWMA that the steps move
    :param pairs: tensors of the EWMA and the parameters that they average
    :param decay: decay of the EWMA
    """

    def __init__(
        self,
        optimizer: th.optim.Optimizer,
        max_grad_norm: float,
        max_kl: float | None,
        average: ParameterEwma | None,
        pairs: tuple[list[th.Tensor], list[th.Tensor]],
        decay: float | None,
    ) -> None:
        (self._group,) = optimizer.param_groups
        self._optimizer = optimizer
        self._parameters = _trainable(optimizer)
        self._states = [adam_state(optimizer, parameter) for parameter in self._parameters]
        self._counts = [float(state["step"]) for state in self._states]
        self._has_gradient: list[bool] = []
        self.max_kl = math.inf if max_kl is None else max_kl
        self._limits = [max_grad_norm, self.max_kl]
        self._average, self._pairs, self._decay = average, pairs, decay or 0.0
        # Total weight of the EWMA after each step
        self._weights = [1.0 if average is None else average.total_weight]
        self._n_made = 0
        self._numbers: list[th.Tensor] = []

    @property
    def tensors(self) -> tuple[Adam, list[th.Tensor], list[th.Tensor]]:
        """
        :return: arguments of the graph
        """
        return (self._adam, *(([], []) if self._average is None else self._pairs))

    @functools.cached_property
    def _adam(self) -> Adam:
        group, states = self._group, self._states
        exp_avgs, exp_avg_sqs = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
        return Adam(self._parameters, exp_avgs, exp_avg_sqs, group["betas"], group["eps"], group["weight_decay"])

    def numbers(self, n: int) -> list[th.Tensor]:
        """
        :param n: number of steps
        :return: those of the next steps, see :class:`StepNumbers`
        """
        while len(self._numbers) < self._n_made + n:
            self._numbers += self._next_numbers().unbind()
        return self._numbers[self._n_made : self._n_made + n]

    def _next_numbers(self) -> th.Tensor:
        n_made, (beta1, beta2) = len(self._numbers), self._group["betas"]
        steps = np.arange(n_made + 1, n_made + 1 + _PREPARED)[:, None] + np.array(self._counts)
        limits = np.tile(self._limits, (_PREPARED, 1))
        for _ in range(_PREPARED):
            self._weights.append(self._decay * self._weights[-1] + 1)
        interpolations = 1 / np.array(self._weights[-_PREPARED:])[:, None]
        numbers = [limits, interpolations, self._group["lr"] / (1 - beta1**steps), np.sqrt(1 - beta2**steps)]
        parameter = self._parameters[0]
        return th.as_tensor(np.hstack(numbers), dtype=parameter.dtype, device=parameter.device)

    def count(self, n_made: int, has_gradient: list[bool]) -> None:
        """
        :param n_made: number of steps that were made
        :param has_gradient: for each parameter whether it had a gradient in them
        """
        if n_made > 0:
            self._n_made += n_made
            self._has_gradient = has_gradient

    def finish(self) -> None:
        """Write counts of steps to where optimiser and EWMA keep them."""
        has_gradient = self._has_gradient or [False] * len(self._parameters)
        for parameter, state, count, stepped in zip(
            self._parameters, self._states, self._counts, has_gradient, strict=True
        ):
            count += self._n_made * stepped
            state["step"].fill_(count)
            if count == 0:
                self._optimizer.state.pop(parameter, None)  # as torch, which has no state without a step
        if self._average is not None:
            self._average.total_weight = self._weights[self._n_made]


class CompiledEngine(StandardEngine):
    """
    The standard engine with steps as compiled graphs, for networks of layers that have no state.

    :param iteration: what the training works with
    :param graphs: the model's graphs
    """

    name: ClassVar[str] = "compiled"

    def __init__(self, iteration: Iteration, graphs: Graphs) -> None:
        super().__init__(iteration)
        self._graphs = graphs
        self._coefficients = as_tensors(iteration.coefficients, iteration.policy)
        # Copies of the policy with π_prox's and π_behav's tensors: a graph cannot put them in place of others.
        self._shadows: dict[int, StandardPolicy] = {}
        self._series: dict[tuple[int, bool], StepSeries] = {}
        iteration.optimizer.zero_grad()
        self._seen: set[Any] = set()

    def step(self, minibatch: Any, objective: Objective) -> bool:
        iteration = self.iteration
        optimizer = iteration.optimizer_of(objective)
        for average in (iteration.prox, iteration.behav):
            if average is not None and id(average) not in self._shadows:
                self._shadows[id(average)] = StandardPolicy(_with_tensors(iteration.policy, average, {}))
        arguments = (iteration.prepare(minibatch), objective, _trainable(optimizer))
        results = self.run(self._policy_gradient, [arguments], optimizer, objective.policy)
        if results is None:
            return super().step(minibatch, objective)
        return self._finish_step(results[0])

    def auxiliary_step(
        self, minibatch: AuxiliaryMinibatch, optimizer: th.optim.Optimizer, coefficients: AuxiliaryCoefficients
    ) -> bool:
        results = self.run(
            self._auxiliary_gradient, [(minibatch, coefficients, _trainable(optimizer))], optimizer, False
        )
        if results is None:
            return super().auxiliary_step(minibatch, optimizer, coefficients)
        return self._finish_step(results[0])

    def _finish_step(self, statistics: dict[str, th.Tensor]) -> bool:
        self.iteration.statistics.add(statistics)
        return not self.is_beyond_max_kl(statistics) and self.was_made(statistics[STEP])

    def _policy_gradient(self, minibatch: Any, objective: Objective, parameters: list[th.Tensor]) -> tuple[Any, ...]:
        loss, statistics = self.loss(self.evaluate(minibatch, objective), minibatch, objective, self._coefficients)
        return loss.detach(), statistics, th.autograd.grad(loss, parameters, allow_unused=True)

    def _auxiliary_gradient(
        self, minibatch: Any, coefficients: AuxiliaryCoefficients, parameters: list[th.Tensor]
    ) -> tuple[Any, ...]:
        loss, statistics = self.auxiliary_loss(self.evaluate_auxiliary(minibatch), minibatch, coefficients)
        return loss.detach(), statistics, th.autograd.grad(loss, parameters, allow_unused=True)

    @th.no_grad()
    def parameters_under(self, average: ParameterEwma, observations: Any) -> Parameters:
        shadow = self._shadows[id(average)]
        return shadow.parameters(shadow.action_outputs(observations))

    def run(
        self,
        gradient: GradientFunction,
        minibatches: list[tuple[Any, ...]],
        optimizer: th.optim.Optimizer,
        moves_average: bool,
    ) -> list[dict[str, th.Tensor]] | None:
        """
        :param gradient: computes the gradient of a minibatch
        :param minibatches: its arguments, for each minibatch; all of one size
        :param optimizer: optimiser of the steps
        :param moves_average: whether each step moves the EWMA
        :return: statistics of the minibatches, ``None`` if the steps have to be made without a graph
        """
        if self._graphs.failure is not None:
            return None
        key = id(optimizer), moves_average
        if key not in self._series:
            iteration = self.iteration
            average = iteration.average if moves_average else None
            self._series[key] = StepSeries(
                optimizer, iteration.max_grad_norm, iteration.max_kl, average, self.pairs(), iteration.prox_decay
            )
        shape = (key, len(minibatches), _size(minibatches[0]))
        try:
            group = self.iteration.process_group
            results = self._graphs(gradient, minibatches, self._series[key], shape in self._seen, group)
        except CompilationError as reason:
            self._finish_series()
            self._graphs.failure = str(reason)
            return None
        self._seen.add(shape)
        self.remember_optimizer(optimizer)
        self.n_steps_since_clearing += len(minibatches)
        return results

    def pairs(self) -> tuple[list[th.Tensor], list[th.Tensor]]:
        """
        :return: tensors of the EWMA and the parameters that they average
        """
        average = self.iteration.average
        return ([], []) if average is None else (average.averages, average.parameters)

    def _finish_series(self) -> None:
        for series in self._series.values():
            series.finish()
        self._series.clear()

    def synchronize(self) -> None:
        self._finish_series()
        super().synchronize()


class CompiledDenseEngine(CompiledEngine, DenseEngine):
    """
    The dense engine with steps as compiled graphs, of several steps each.

    :param iteration: what the training works with
    :param graphs: the model's graphs
    """

    name: ClassVar[str] = "compiled dense"
    # A graph is slower where parts of one tensor change.
    is_stacked: ClassVar[bool] = False

    def __init__(self, iteration: Iteration, graphs: Graphs) -> None:
        super().__init__(iteration, graphs)
        self._queue: list[Any] = []
        self._goes_on = True

    def step(self, minibatch: Any, objective: Objective) -> bool:
        if not self._goes_on:
            return False
        self._queue.append(minibatch)
        # Processes exchange gradients at every step.
        is_single = self.iteration.max_kl is not None or self.iteration.process_group is not None
        n_unrolled = 1 if is_single else _UNROLLED
        if len({len(each.features) for each in self._queue}) > 1 or len(self._queue) == n_unrolled:
            self._flush()
        return self._goes_on

    def _flush(self) -> None:
        queue, self._queue = self._queue if self._goes_on else [], []
        is_group = len(queue) == _UNROLLED and len({len(each.features) for each in queue}) == 1
        for minibatches in [queue] if is_group else [[each] for each in queue]:
            arguments = [(each, self._coefficients) for each in minibatches]
            results = self.run(self._dense_gradient, arguments, self.dense_optimizer, True)
            if results is None:
                self._goes_on = self._goes_on and all(DenseEngine.step(self, each, _JOINT) for each in minibatches)
                continue
            for values in results:
                self.wait_with(values)
                made = not self.is_beyond_max_kl(values) and self.was_made(values[STEP])
                self._goes_on = self._goes_on and made
            if not self._goes_on:
                return

    def _dense_gradient(self, minibatch: Any, coefficients: Coefficients) -> tuple[Any, ...]:
        gradient, finite, values = self.gradient(minibatch, coefficients)
        return finite, values, [gradient]

    def pairs(self) -> tuple[list[th.Tensor], list[th.Tensor]]:
        if self.average is None:
            return [], []
        return [self.average, *self._other_averages], [self.trained, *self._other_parameters]

    def parameters_under(self, average: ParameterEwma, observations: Any) -> Parameters:
        return DenseEngine.parameters_under(self, average, observations)  # never in a graph

    def end_epoch(self) -> None:
        self._flush()
        super().end_epoch()


def _trainable(optimizer: th.optim.Optimizer) -> list[th.Tensor]:
    return [parameter for parameter in optimizer.param_groups[0]["params"] if parameter.requires_grad]


def as_tensors(coefficients: Coefficients, policy: nn.Module) -> Coefficients:
    """
    :param coefficients: hyper-parameters of the loss
    :param policy: the policy
    :return: tensors in place of the numbers; terms that are off stay numbers
    """
    like = next(policy.parameters())
    tensors = [
        None if each is None else th.tensor(each, dtype=like.dtype, device=like.device) if is_on(each) else 0.0
        for each in coefficients
    ]
    return Coefficients(*tensors)  # type: ignore[arg-type]  # None only where it was


def _with_tensors(module: nn.Module, average: ParameterEwma, memo: dict[int, nn.Module]) -> nn.Module:
    """
    :param module: a module
    :param average: tensors for its parameters
    :param memo: modules that are copied already
    :return: shallow copy of module and submodules with these tensors in place of the parameters
    """
    if id(module) not in memo:
        tensors = {id(p): a for p, a in zip(average.parameters, average.averages, strict=True)}
        memo[id(module)] = shadow = copy.copy(module)
        parameters = module._parameters.items()
        vars(shadow)["_parameters"] = {name: None if p is None else tensors.get(id(p), p) for name, p in parameters}
        vars(shadow)["_modules"] = {
            name: None if each is None else _with_tensors(each, average, memo) for name, each in module._modules.items()
        }
    return memo[id(module)]


def _size(arguments: tuple[Any, ...]) -> int:
    """
    :param arguments: arguments of a gradient function, a minibatch first
    :return: number of its samples
    """
    minibatch = arguments[0]
    return len(minibatch.samples.returns if isinstance(minibatch, AuxiliaryMinibatch) else minibatch.advantages)
