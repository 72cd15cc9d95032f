"""
The states that our algorithms save beside those of the SB3 algorithm they extend: the moving average of the policy,
advantage moments, more optimisers, random number generators.

In a saved file they are one member of SB3's zip archive that SB3 does not read, so that SB3's own classes can load it.
"""

import copy
import hashlib
import pathlib
import zipfile
from collections.abc import Collection, Iterable, Mapping
from io import BytesIO
from typing import Any, NamedTuple, Protocol, TypeAlias, cast, runtime_checkable

import torch as th
from stable_baselines3.common.save_util import load_from_zip_file

from sb3_ppo_ewma.checkpointing.model_files import SavePath, check_archive, name_of, opened
from sb3_ppo_ewma.checkpointing.state_checks import check_optimizer, check_tensors

StateDict: TypeAlias = dict[str, Any]

# SB3 reads the members that end in ".pth".
_MEMBER = "sb3_ppo_ewma_states.pt"


class OwnState(Protocol):
    """
    What a model saves by attribute: a ``torch.nn.Module``, an optimiser, or an object with these two methods of a
    module.
    """

    def state_dict(self) -> StateDict:
        """
        :return: tensors, numbers and containers of them, which ``torch.load(weights_only=True)`` accepts
        """

    def load_state_dict(self, state_dict: StateDict, strict: bool = True) -> Any:
        """
        :param state_dict: result of :meth:`state_dict`; its tensors can be on another device
        :param strict: whether every entry must be there; optimisers do not have this parameter
        """


@runtime_checkable
class Resettable(Protocol):
    """An own state that starts afresh when loaded parameters do not have it. Optimisers do so without this method."""

    def reset(self) -> None:
        """Return to the state of a new model with the current parameters of the policy."""


@runtime_checkable
class FollowsPolicy(Protocol):
    """
    An own state that is derived from the policy's parameters. When a policy is loaded without it, it is reset, even if
    the parameters need not match exactly.
    """

    def parameters_loaded(self) -> None:
        """
        Called at the end of ``set_parameters()`` and ``load()``: the policy's parameters are the same tensors with
        other values. The own state has been loaded or reset before.
        """


class Differences(NamedTuple):
    """
    How loaded parameters differ from what a model saves.

    :param missing: names of the own states that the model has and the parameters lack
    :param surplus: names of the own states that the parameters have and the model lacks
    """

    missing: list[str]
    surplus: list[str]

    def message(self, silent: Collection[str]) -> str:
        """
        :param silent: names whose absence is not worth a warning
        :return: text of the warning; empty if there is nothing to say
        """
        parts = []
        started = [name for name in self.missing if name not in silent]
        if started:
            parts.append(f"without {', '.join(started)}: started afresh from the loaded policy")
        if self.surplus:
            parts.append(f"with {', '.join(self.surplus)}, which this model does not use: dropped")
        return f"Loaded parameters {'; '.join(parts)}." if parts else ""


def parameters_digest(policy: th.nn.Module) -> str:
    """
    :param policy: a policy
    :return: a text that differs for other parameters
    """
    digest = hashlib.sha256()
    for parameter in policy.parameters():
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(th.uint8).numpy().tobytes())
    return digest.hexdigest()


def present_attributes(model: Any, names: Iterable[str]) -> dict[str, Any]:
    """
    Select the attributes that a model has in its configuration.

    :param model: algorithm
    :param names: names of attributes, some of which may be ``None``
    :return: those that are not ``None``, by name
    """
    values = {name: getattr(model, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def own_state_dicts(model: Any, names: Iterable[str]) -> dict[str, StateDict]:
    """
    Read the own states of a model.

    :param model: algorithm
    :param names: names of its attributes with own states, some of which may be ``None``
    :return: state dictionaries by name, without empty ones
    """
    states = {name: state.state_dict() for name, state in present_attributes(model, names).items()}
    return {name: state for name, state in states.items() if state}


# ---------------------------------------------------------------------- files


def append_own_states(file: pathlib.Path | BytesIO, state_dicts: Mapping[str, StateDict]) -> None:
    """
    Add own states to a file that SB3 has written.

    :param file: zip archive
    :param state_dicts: states by name
    """
    with zipfile.ZipFile(file, "a") as archive, archive.open(_MEMBER, "w", force_zip64=True) as member:
        th.save(dict(state_dicts), member)


def read_own_states(path: SavePath) -> dict[str, StateDict]:
    """
    Read the own states from a saved file, without unpickling arbitrary objects.

    :param path: file name (``.zip`` is added if needed) or open binary file
    :return: states by name, on the CPU; empty if SB3 or an earlier version of this package wrote the file
    """
    with opened(path) as file, zipfile.ZipFile(file) as archive:
        if _MEMBER not in archive.namelist():
            return {}
        with archive.open(_MEMBER) as member:
            return cast(dict[str, StateDict], th.load(member, map_location="cpu", weights_only=True))


# ---------------------------------------------------------------------- loading


def split_parameters(
    path_or_parameters: SavePath | dict[str, StateDict], known: Collection[str], device: th.device | str
) -> tuple[dict[str, StateDict], dict[str, StateDict]]:
    """
    Read parameters and separate own states from what SB3 loads.

    :param path_or_parameters: saved file, or dictionary as from ``get_parameters()``
    :param known: names of own states in dictionaries and in files of earlier versions, which had them beside SB3's
    :param device: device for SB3's tensors
    :return: SB3's parameters and own states, by name
    :raises ValueError: if the file is damaged or has more than tensors, which is not read
    """
    if isinstance(path_or_parameters, dict):
        parameters, own = path_or_parameters, {}
    else:
        check_archive(path_or_parameters, name_of(path_or_parameters))
        parameters = cast(
            dict[str, StateDict], load_from_zip_file(path_or_parameters, load_data=False, device=device)[1]
        )
        own = read_own_states(path_or_parameters)
    sb3s = {name: state for name, state in parameters.items() if name not in known}
    return sb3s, {**own, **{name: state for name, state in parameters.items() if name in known}}


def check_loaded(parts: Mapping[str, Any], loaded: Mapping[str, Any]) -> None:
    """
    :param parts: what a model saves, by name: modules, optimisers, own states
    :param loaded: state dictionaries for them; of other names, nothing is checked
    :raises DamagedStateError: if a state cannot be one of the part: not finite, or of other shapes or kinds
    """
    for name, part in parts.items():
        if name not in loaded:
            continue
        if isinstance(part, th.optim.Optimizer):
            check_optimizer(name, loaded[name], part)
        else:
            check_tensors(name, loaded[name], part.state_dict())


class Snapshot:
    """
    The states of parts of a model, to which it returns if loading others fails.

    :param parts: modules, optimisers and own states by name
    """

    def __init__(self, parts: Mapping[str, Any]) -> None:
        self._states = [(part, copy.deepcopy(part.state_dict())) for part in parts.values()]

    def restore(self) -> None:
        """Give the parts the states they had."""
        for part, state in self._states:
            part.load_state_dict(state)


def load_own_states(
    states: Mapping[str, OwnState],
    loaded: Mapping[str, StateDict],
    *,
    policy: Any,
    exact_match: bool,
    is_policy_loaded: bool,
) -> Differences:
    """
    Load own states after SB3's parameters. Those that were not loaded start afresh if all parameters were meant to be
    loaded, or if they follow a policy that was.

    :param states: own states of the model, by name
    :param loaded: what to load into them, by name
    :param policy: the model's policy
    :param exact_match: whether all parameters were meant to be loaded
    :param is_policy_loaded: whether the policy was among them
    :return: names on one side only
    """
    missing = [name for name in states if name not in loaded]
    for name, state in states.items():
        if name in loaded and isinstance(state, th.optim.Optimizer):
            state.load_state_dict(loaded[name])
        elif name in loaded:
            state.load_state_dict(loaded[name], strict=exact_match)
    for name in missing:
        if exact_match or (is_policy_loaded and isinstance(states[name], FollowsPolicy)):
            _start_afresh(states[name], policy)
    for state in states.values():
        if isinstance(state, FollowsPolicy):
            state.parameters_loaded()
    return Differences(missing, [name for name in loaded if name not in states])


def _start_afresh(state: OwnState, policy: Any) -> None:
    if isinstance(state, th.optim.Optimizer):
        # Some optimisers fill their state when they are built, so clearing it is not enough.
        learning_rate = state.defaults["lr"]
        parameters = [parameter for group in policy.optimizer.param_groups for parameter in group["params"]]
        fresh = policy.optimizer_class(parameters, lr=learning_rate, **policy.optimizer_kwargs)
        state.load_state_dict(fresh.state_dict())
    elif isinstance(state, Resettable):
        state.reset()
