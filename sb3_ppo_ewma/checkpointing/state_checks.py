"""Check states before they are loaded: finite, of the shapes of the parameters, with counters that can be."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch as th

# Optimisers of PyTorch whose state has other shapes than the parameters
_OTHER_SHAPES = ("LBFGS", "Adafactor")
_SCALARS = ("step", "eta", "mu", "mu_product")
_NOT_NEGATIVE = ("step", "exp_avg_sq", "max_exp_avg_sq", "square_avg", "exp_inf", "sum", "acc_delta")
# What these optimisers read at their next step
_NEEDED = {
    "Adam": {"step", "exp_avg", "exp_avg_sq"},
    "AdamW": {"step", "exp_avg", "exp_avg_sq"},
    "RMSprop": {"square_avg"},
    "RMSpropTFLike": {"square_avg"},
}


class DamagedStateError(RuntimeError, ValueError):
    """
    A state that cannot be one of training. A ``ValueError``, and also a ``RuntimeError``, which SB3's ``load()`` lets
    pass as it is.
    """


def check_tensors(name: str, loaded: Any, present: Any) -> None:
    """
    :param name: of the state, for the message
    :param loaded: containers of tensors and numbers
    :param present: what the model has in its place; where it is infinite, the loaded may be too
    :raises DamagedStateError: if a number is NaN or Inf
    """
    known = dict(_leaves(present))
    for path, value in _leaves(loaded):
        if not isinstance(value, th.Tensor | float):
            continue
        tensor = th.as_tensor(value)
        if not (tensor.is_floating_point() or tensor.is_complex()) or bool(th.isfinite(tensor).all()):
            continue
        own = th.as_tensor(known.get(path, math.nan))
        broken = ~th.isfinite(tensor)
        if own.shape != tensor.shape or not bool((own.to(tensor)[broken] == tensor[broken]).all()):
            raise DamagedStateError(f"NaN or Inf in {path!r} of the loaded {name}")


def check_optimizer(name: str, loaded: Any, optimizer: th.optim.Optimizer) -> None:
    """
    :param name: of the optimiser, for the message
    :param loaded: state dictionary for it
    :param optimizer: the model's optimiser, which is not changed
    :raises DamagedStateError: if the state cannot be one of this optimiser
    """
    try:
        _check_optimizer(name, loaded, optimizer)
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedStateError(f"the loaded {name} is not the state of an optimiser ({error!r})") from error


def _check_optimizer(name: str, loaded: Any, optimizer: th.optim.Optimizer) -> None:
    groups, states = loaded["param_groups"], loaded["state"]
    indices = [group["params"] for group in groups]
    present = [group["params"] for group in optimizer.param_groups]
    sizes, expected = list(map(len, indices)), list(map(len, present))
    if sizes != expected:
        raise DamagedStateError(f"the loaded {name} has groups of {sizes} parameters, the model's has {expected}")
    flat = [index for group in indices for index in group]
    parameters = dict(zip(flat, (parameter for group in present for parameter in group), strict=True))
    if len(parameters) < len(flat) or not set(states) <= set(parameters):
        raise DamagedStateError(f"the loaded {name} has states of parameters {sorted(states)}, but is for {flat}")
    for group, own in zip(groups, optimizer.param_groups, strict=True):
        _check_settings(name, group, own, is_torchs=_is_torchs(optimizer))
    for index, state in states.items():
        _check_state(f"{name}, parameter {index}", state, parameters[index], optimizer)
    for group in indices:
        names = [set(states[index]) for index in group if index in states]
        if _is_torchs(optimizer) and any(each != names[0] for each in names):
            raise DamagedStateError(f"the loaded {name} has {set.union(*names)} of some parameters, not of all")


def _is_torchs(optimizer: th.optim.Optimizer) -> bool:
    cls = type(optimizer)
    return cls.__module__.startswith(("torch.optim", "stable_baselines3")) and cls.__name__ not in _OTHER_SHAPES


def _check_settings(name: str, loaded: Mapping[str, Any], present: Mapping[str, Any], is_torchs: bool) -> None:
    for setting, own in present.items():
        if setting == "params" or isinstance(own, bool) or not isinstance(own, int | float | tuple | th.Tensor):
            continue
        value = loaded.get(setting)
        numbers, own_numbers = (list(each) if isinstance(each, tuple | list) else [each] for each in (value, own))
        low, high = (0.0 if is_torchs else -math.inf), (1.0 if setting == "betas" else math.inf)
        if len(numbers) != len(own_numbers) or not all(
            (number is None and own_number is None)
            or (isinstance(number, int | float | th.Tensor) and low <= float(number) < high)
            for number, own_number in zip(numbers, own_numbers, strict=True)
        ):
            raise DamagedStateError(f"the loaded {name} has {setting}={value!r}")


def _check_state(name: str, state: Any, parameter: th.Tensor, optimizer: th.optim.Optimizer) -> None:
    """
    :param name: of optimiser and parameter
    :param state: of the parameter
    :param parameter: the model's
    :param optimizer: whose state it is
    """
    missing = _NEEDED.get(type(optimizer).__name__, set()) - set(state)
    if missing and state:
        raise DamagedStateError(f"the loaded state of {name} has no {sorted(missing)}")
    check_tensors(f"state of {name}", state, {})
    for key, value in state.items():
        if _is_torchs(optimizer):
            _check_shape(f"{key!r} in the loaded state of {name}", key, value, parameter.shape)
        if not isinstance(value, int | float | th.Tensor):
            continue
        tensor = th.as_tensor(value)
        if key in _NOT_NEGATIVE and bool((tensor < 0).any()):
            raise DamagedStateError(f"{key!r} in the loaded state of {name} is negative")
        if key == "step" and float(tensor) != int(tensor):
            raise DamagedStateError(f"'step' in the loaded state of {name} is {float(tensor)}, no number of steps")


def _check_shape(name: str, key: str, value: Any, shape: th.Size) -> None:
    """
    :param name: of the entry, for the message
    :param key: of the entry in the state of a parameter
    :param value: the entry, ``None`` where an optimiser has no use for it
    :param shape: of the parameter
    """
    if key in _SCALARS and isinstance(value, int | float):
        return
    if value is not None and not isinstance(value, th.Tensor):
        raise DamagedStateError(f"{name} is {value!r}")
    if isinstance(value, th.Tensor) and (value.numel() != 1 if key in _SCALARS else value.shape != shape):
        expected = "one number" if key in _SCALARS else tuple(shape)
        raise DamagedStateError(f"{name} has the shape {tuple(value.shape)}, expected {expected}")


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from _leaves(each, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for index, each in enumerate(value):
            yield from _leaves(each, f"{path}.{index}")
    else:
        yield path, value
