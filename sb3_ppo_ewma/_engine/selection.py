"""
The one place that decides which engine runs: the fastest one that recognises everything it relies on. It decides again
at every rollout and every training, because a callback may have changed anything in between.
"""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch as th

from sb3_ppo_ewma._arguments import warn_caller
from sb3_ppo_ewma._engine.collection import fast_cells, fast_forward, unknown_collection
from sb3_ppo_ewma._engine.compiled import CompilationError, CompiledDenseEngine, CompiledEngine, Graphs
from sb3_ppo_ewma._engine.dense import DenseEngine
from sb3_ppo_ewma._engine.dense_networks import unknown_networks, unknown_parameters
from sb3_ppo_ewma._engine.fused import FusedEngine, unusual_optimizer
from sb3_ppo_ewma._engine.iteration import Engine, Iteration, unknown_buffer
from sb3_ppo_ewma._engine.microbatches import MicrobatchEngine
from sb3_ppo_ewma._engine.recognition import (
    has_convolutions,
    hooks,
    patched_classes,
    unknown_distribution,
    unknown_modules,
    unknown_policy,
)
from sb3_ppo_ewma._engine.reference import ReferenceEngine
from sb3_ppo_ewma._engine.sequences import SequenceEngine
from sb3_ppo_ewma._engine.standard import StandardEngine
from sb3_ppo_ewma.evaluation import PolicyEvaluation
from sb3_ppo_ewma.rollouts import BufferMinibatches, DeviceMinibatches


class Question(NamedTuple):
    """
    Everything the choice of an engine depends on.

    :param iteration: what the training works with
    :param optimizers: the optimisers that will step
    :param engine: the parameter ``engine``
    :param torch_compile: the parameter ``torch_compile``
    :param graphs: the model's graphs, ``None`` before the first
    :param is_auxiliary: whether it is an auxiliary phase
    """

    iteration: Iteration
    optimizers: list[th.optim.Optimizer]
    engine: str
    torch_compile: bool | str
    graphs: Graphs | None
    is_auxiliary: bool


class Requirement(NamedTuple):
    """
    Something that an engine relies on.

    :param missing: says why it is not met, ``None`` if it is
    :param remedy: how a user can meet it, empty if a user cannot
    """

    missing: Callable[[Question], str | None]
    remedy: str = ""


def _not_automatic(question: Question) -> str | None:
    return "engine='reference'" if question.engine == "reference" else None


def _unusual_optimizer(question: Question) -> str | None:
    policy = question.iteration.policy
    return next((reason for each in question.optimizers if (reason := unusual_optimizer(each, policy))), None)


def _unknown_policy(question: Question) -> str | None:
    if type(question.iteration.evaluation) is not PolicyEvaluation:
        return f"policies are evaluated by {type(question.iteration.evaluation).__name__}"
    policy = question.iteration.policy
    if th.is_autocast_enabled(policy.device.type):
        return "torch.autocast is on"
    return patched_classes() or unknown_policy(policy) or unknown_distribution(policy)


def _unknown_modules(question: Question) -> str | None:
    policy = question.iteration.policy
    return unknown_modules(policy) or hooks(policy.modules())


def _not_dense(question: Question) -> str | None:
    if question.is_auxiliary:
        return "the auxiliary phase trains more than the networks"
    return unknown_networks(question.iteration.policy) or unknown_parameters(question.iteration.policy)


def _several_objectives(question: Question) -> str | None:
    return (
        None if question.iteration.value_optimizer is None else "n_epochs_value gives the value function its own epochs"
    )


def _analytic_kl(question: Question) -> str | None:
    return "kl_estimator='analytic'" if question.iteration.analytic_kl else None


def _extra_loss(question: Question) -> str | None:
    has_none = question.iteration.extra_loss is None or question.is_auxiliary
    return None if has_none else "the algorithm adds a term to the loss"


def _not_images_on_cpu(policy: Any) -> str | None:
    if policy.device.type != "cpu":
        return f"the policy is on {policy.device}"
    return None if has_convolutions(policy) else "the policy has no convolutions"


def _other_minibatches(question: Question) -> str | None:
    iteration = question.iteration
    if question.is_auxiliary or type(iteration.source) is DeviceMinibatches:
        return None
    reason = unknown_buffer(iteration.model, iteration.model.rollout_buffer)
    if reason is None and iteration.source is not None:
        return "the rollout does not fit onto the device, or is not complete"
    return reason


def _tensor_coefficients(question: Question) -> str | None:
    is_tensor = any(isinstance(each, th.Tensor) for each in question.iteration.coefficients)
    return "a coefficient of the loss is a tensor" if is_tensor else None


def _not_compiled(question: Question) -> str | None:
    if not question.torch_compile:
        return "torch_compile=False"
    graphs = question.graphs
    if graphs is not None and graphs.failure is not None and graphs.mode == _mode(question.torch_compile):
        return graphs.failure
    groups = {len(optimizer.param_groups) for optimizer in question.optimizers}
    return None if groups == {1} else "the optimizer has several parameter groups"


def _not_recurrent(question: Question) -> str | None:
    return None if question.iteration.evaluation.sequence_fields else "the policy is not recurrent"


def _unknown_sequences(question: Question) -> str | None:
    iteration = question.iteration
    if th.is_autocast_enabled(iteration.policy.device.type):
        return "torch.autocast is on"
    return patched_classes() or iteration.evaluation.unknown_sequences(iteration.policy)


def _unknown_recurrent_buffer(question: Question) -> str | None:
    iteration = question.iteration
    if question.is_auxiliary:
        return None
    if not isinstance(iteration.source, BufferMinibatches):
        return iteration.evaluation.unknown_sequence_buffer(iteration.model.rollout_buffer)
    buffer = iteration.source.buffer
    return iteration.evaluation.unknown_sequence_buffer(buffer) if buffer.full else "the rollout is not complete"


BUFFER = Requirement(_other_minibatches, "SB3's rollout buffer, complete and in the dtype of the policy")
NUMBERS = Requirement(_tensor_coefficients, "coefficients that are numbers")
AUTOMATIC = Requirement(_not_automatic, "engine='auto'")
ADAM = Requirement(_unusual_optimizer, "SB3's default optimizer, for all parameters")
POLICY = Requirement(
    _unknown_policy, "a policy that overrides no method of SB3's, with an action distribution of SB3's"
)
MODULES = Requirement(_unknown_modules, "features extractors and layers of torch, SB3 or this package, without hooks")
DENSE = Requirement(_not_dense, "MlpPolicy with nn.Tanh or nn.ReLU")
ONE_LOSS = Requirement(_several_objectives, "n_epochs_value=None")
SAMPLED_KL = Requirement(_analytic_kl, "kl_estimator='sample'")
NO_EXTRA_LOSS = Requirement(_extra_loss)
IMAGES_ON_CPU = Requirement(lambda question: _not_images_on_cpu(question.iteration.policy))
RECURRENT = Requirement(_not_recurrent)
SEQUENCES = Requirement(
    _unknown_sequences, "a recurrent policy that overrides no method of sb3-contrib's, without hooks or dropout"
)
SEQUENCE_BUFFER = Requirement(_unknown_recurrent_buffer, "the rollout buffer of the algorithm, complete")
COMPILED = Requirement(_not_compiled, "torch_compile=True")

# No code of the user runs between the minibatches of a training.
_FIXED = (NO_EXTRA_LOSS, NUMBERS, BUFFER)

# From the fastest to the slowest, with what each relies on: settings first, which explain the most
ENGINES: tuple[tuple[Any, tuple[Requirement, ...]], ...] = (
    (CompiledDenseEngine, (AUTOMATIC, COMPILED, ONE_LOSS, SAMPLED_KL, *_FIXED, ADAM, POLICY, DENSE)),
    (CompiledEngine, (AUTOMATIC, COMPILED, *_FIXED, ADAM, POLICY, MODULES)),
    (DenseEngine, (AUTOMATIC, ONE_LOSS, SAMPLED_KL, *_FIXED, ADAM, POLICY, DENSE)),
    (MicrobatchEngine, (AUTOMATIC, *_FIXED, ADAM, POLICY, MODULES, IMAGES_ON_CPU)),
    (SequenceEngine, (AUTOMATIC, RECURRENT, SEQUENCES, NO_EXTRA_LOSS, NUMBERS, SEQUENCE_BUFFER, ADAM)),
    (StandardEngine, (AUTOMATIC, ADAM, POLICY)),
    (FusedEngine, (AUTOMATIC, ADAM)),
    (ReferenceEngine, ()),
)


class Choice(NamedTuple):
    """
    The chosen engine, and why the faster ones were not.

    :param engine: class of the engine
    :param declined: by name of each faster engine, the first reason against it and the remedy
    """

    engine: Any
    declined: dict[str, tuple[str, str]]

    def explanation(self) -> str:
        """
        :return: the choice in words, a line for each engine that was considered
        """
        lines = [f"engine {self.engine.name!r}: the fastest one that computes what this model defines"]
        for name, (reason, remedy) in self.declined.items():
            lines.append(f"- not {name!r}: {reason}" + (f"; it needs {remedy}" if remedy else ""))
        return "\n".join(lines)


def choose(question: Question) -> Choice:
    """
    :param question: everything the choice depends on
    :return: the fastest engine that recognises everything it relies on
    """
    found: dict[int, str | None] = {}
    declined: dict[str, tuple[str, str]] = {}
    for engine, requirements in ENGINES:
        reason = _reason_against(requirements, question, found)
        if reason is None:
            break
        declined[engine.name] = reason
    return Choice(engine, declined)


def choose_together(question: Question, process_group: Any) -> Choice:
    """
    :param question: everything the choice depends on in this process
    :param process_group: processes that train together, which all call this: each engine exchanges other tensors
    :return: the fastest engine that recognises everything it relies on in all of them
    """
    found: dict[int, str | None] = {}
    by_rank = process_group.gather([_reason_against(needed, question, found) for _, needed in ENGINES])
    declined: dict[str, tuple[str, str]] = {}
    for index, (engine, _) in enumerate(ENGINES):
        others = (
            (f"{each[index][0]} (in rank {rank})", each[index][1]) for rank, each in enumerate(by_rank) if each[index]
        )
        reason = by_rank[process_group.rank][index] or next(others, None)
        if reason is None:
            break
        declined[engine.name] = reason
    return Choice(engine, declined)


def _reason_against(
    requirements: tuple[Requirement, ...], question: Question, found: dict[int, str | None]
) -> tuple[str, str] | None:
    """
    :param requirements: of an engine
    :param question: everything the choice depends on
    :param found: what was missing of requirements of the same question, by identity
    :return: the first thing that is missing, and its remedy; ``None`` if nothing is
    """
    for requirement in requirements:
        if id(requirement) not in found:
            found[id(requirement)] = requirement.missing(question)
        reason = found[id(requirement)]
        if reason is not None:
            return reason, requirement.remedy
    return None


class EngineSelector:
    """Chooses the engines of one model, and keeps its compiled graphs."""

    def __init__(self) -> None:
        self.choice: Choice | None = None
        self._graphs: Graphs | None = None
        self._warned: set[str] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()  # graphs belong to a process; a copy makes its own

    def engine_for(
        self, model: Any, iteration: Iteration, optimizers: list[th.optim.Optimizer], is_auxiliary: bool = False
    ) -> Engine:
        """
        :param model: the algorithm, whose ``engine``, ``torch_compile`` and ``verbose`` are read
        :param iteration: what the training works with
        :param optimizers: the optimisers that will step
        :param is_auxiliary: whether it is an auxiliary phase
        :return: the engine that makes its steps
        """
        question = self._question(model, iteration, optimizers, is_auxiliary)
        group = iteration.process_group
        choice = choose(question) if group is None else choose_together(question, group)
        engine: Engine
        if not issubclass(choice.engine, CompiledEngine):
            engine = choice.engine(iteration)
        else:
            try:
                engine = choice.engine(iteration, self._graphs_of(model))
            except CompilationError as error:
                self._graphs = Graphs.failed(_mode(model.torch_compile), str(error))
                return self.engine_for(model, iteration, optimizers, is_auxiliary)
        if not is_auxiliary:
            self._announce(model, choice)
            self.choice = choice
        return engine

    def choose(self, model: Any, iteration: Iteration, optimizers: list[th.optim.Optimizer]) -> Choice:
        """
        :param model: the algorithm, whose ``engine`` and ``torch_compile`` are read
        :param iteration: what a training works with
        :param optimizers: the optimisers that will step
        :return: the choice of this process alone, with reasons
        """
        return choose(self._question(model, iteration, optimizers, is_auxiliary=False))

    def _question(
        self, model: Any, iteration: Iteration, optimizers: list[th.optim.Optimizer], is_auxiliary: bool
    ) -> Question:
        return Question(iteration, optimizers, model.engine, model.torch_compile, self._graphs, is_auxiliary)

    def collecting(self, model: Any) -> AbstractContextManager[None]:
        """
        :param model: the algorithm
        :return: context in which its policy collects
        """
        policy = model.policy
        if model.engine == "reference" or th.is_autocast_enabled(policy.device.type) or patched_classes() is not None:
            return contextlib.nullcontext()
        return fast_forward(policy) if unknown_collection(policy) is None else fast_cells(policy)

    def report(self, model: Any, iteration: Iteration) -> None:
        """
        Warn, once each, where ``torch_compile`` had no effect, or is slower than the default.

        :param model: the algorithm
        :param iteration: what the training worked with
        """
        if not model.torch_compile or self.choice is None or model.engine == "reference":
            return
        given = f"torch_compile={model.torch_compile!r}"
        declined = self.choice.declined.get(CompiledEngine.name)
        reason = None if declined is None else declined[0]
        if self._graphs is not None and self._graphs.failure is not None:
            reason = self._graphs.failure
        if reason is not None:
            self._warn_once(f"{given} has no effect, training goes on without it: {reason}")
        elif self.choice.engine is CompiledEngine and _not_images_on_cpu(iteration.policy) is None:
            self._warn_once(f"{given} is slower than the default for a policy with convolutions on a CPU")

    def _graphs_of(self, model: Any) -> Graphs:
        if self._graphs is None or self._graphs.mode != _mode(model.torch_compile):
            self._graphs = Graphs(_mode(model.torch_compile))
        return self._graphs

    def _announce(self, model: Any, choice: Choice) -> None:
        if model.verbose >= 1 and (self.choice is None or self.choice.engine is not choice.engine):
            print(f"Training with the {choice.engine.name!r} engine (model.explain_engine() says why)")

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warn_caller(message)


def _mode(torch_compile: bool | str) -> str | None:
    return None if torch_compile is True else str(torch_compile)
