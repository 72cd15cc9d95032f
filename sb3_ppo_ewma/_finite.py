"""NaN and Inf in what a model has learned: parameters, their moving average, moments of the optimisers."""

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch as th

# State of torch's optimisers that every later step uses
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg")
_SMALL = 2**16


def broken_tensor(model: Any) -> str | None:
    """
    :param model: an algorithm of this package
    :return: the first of its trained tensors with a NaN or Inf, in words; ``None`` if all are finite
    """
    if all_finite(tensor for _, _, tensor in _trained_tensors(model)):
        return None
    found = ((kind, name) for kind, name, tensor in _trained_tensors(model) if not bool(th.isfinite(tensor).all()))
    kind, name = next(found, ("", ""))
    return f"{kind} parameter {name!r}" if name else None  # else only the sum has overflowed


def check_trained_tensors(model: Any) -> None:
    """
    :param model: an algorithm of this package that is about to learn
    :raises ValueError: if one of its trained tensors has a NaN or Inf
    """
    broken = broken_tensor(model)
    if broken is not None:
        raise ValueError(f"NaN or Inf in {broken}, the model cannot learn with it: load parameters that are finite")


def lost(model: Any, broken: str) -> ValueError:
    """
    :param model: an algorithm of this package that was trained
    :param broken: from :func:`broken_tensor`
    :return: the error that says so
    """
    learning_rate = model.policy.optimizer.param_groups[0]["lr"]
    return ValueError(
        f"NaN or Inf in {broken} after {model._n_updates} epochs and {model.num_timesteps} steps: load parameters that "
        f"were saved earlier. A smaller learning rate (it was {learning_rate}) or max_grad_norm may help."
    )


@contextlib.contextmanager
def naming_broken_tensors(model: Any) -> Iterator[None]:
    """
    Errors within this context, in which a model is trained, that come from a NaN or Inf in what it has learned name it.

    :param model: an algorithm of this package
    :raises ValueError: from such an error
    """
    try:
        yield
    except (ValueError, RuntimeError, ArithmeticError) as error:
        broken = broken_tensor(model)
        if broken is None:
            raise
        raise lost(model, broken) from error


@th.no_grad()
def all_finite(tensors: Iterable[th.Tensor]) -> bool:
    """
    :param tensors: floating-point tensors
    :return: False if one of them has a NaN or Inf; also if numbers are so large that their sum overflows
    """
    groups: dict[Any, list[th.Tensor]] = defaultdict(list)
    for tensor in tensors:
        # Many small ones are faster together, large ones are not worth a copy.
        part = tensor.reshape(-1) if tensor.numel() <= _SMALL else tensor.sum().reshape(1)
        groups[tensor.device, tensor.dtype].append(part)
    return all(math.isfinite(th.cat(group).sum()) for group in groups.values())


def _trained_tensors(model: Any) -> Iterator[tuple[str, str, th.Tensor]]:
    """
    :param model: an algorithm of this package
    :return: what a tensor is, name of its parameter, and the tensor
    """
    names = {}
    for name, parameter in model.policy.named_parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            names[id(parameter)] = name
            yield "the policy's", name, parameter
    if model.policy_ewma is not None:
        for name, average in zip(model.policy_ewma.names, model.policy_ewma.averages, strict=True):
            yield "the moving average of the policy's", name, average
    optimizers = {
        "optimizer": model.policy.optimizer,
        **{name: getattr(model, name) for name in model._further_optimizers},
    }
    for optimizer_name, optimizer in optimizers.items():
        for parameter, state in () if optimizer is None else optimizer.state.items():
            for key in _MOMENTS:
                if isinstance(state.get(key), th.Tensor) and id(parameter) in names:
                    yield f"{key} of {optimizer_name} for the policy's", names[id(parameter)], state[key]
