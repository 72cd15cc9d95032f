"""The state of objects that keep it outside of Python: MuJoCo, the Arcade Learning Environment, tables of pandas."""

import hashlib
import importlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

# Lists of contacts, constraints and islands change their lengths, and every step of MuJoCo makes them anew.
_OF_ONE_STEP = re.compile(r"^(contact|efc|iefc|map|iacc|ifrc|idof|iLD|iM)|island")


class UnknownStateError(ValueError):
    """An object holds something that cannot be saved or restored."""


class Simulator(NamedTuple):
    """
    :param read: from an object to its state, as plain data
    :param write: puts a state into an object; ``None``: the object is not changed, its state must be the same
    """

    read: Callable[[Any], Any]
    write: Callable[[Any, Any], None] | None


def _mujoco() -> Any:
    return importlib.import_module("mujoco")


def _mujoco_arrays(data: Any) -> dict[str, np.ndarray]:
    found = {name: getattr(data, name, None) for name in dir(data) if not name.startswith("_")}
    return {
        name: array for name, array in found.items() if isinstance(array, np.ndarray) and not _OF_ONE_STEP.search(name)
    }


def _read_mujoco_data(data: Any) -> Any:
    mujoco = _mujoco()
    # What the next step begins with; and what environments may read before it
    kind = mujoco.mjtState.mjSTATE_INTEGRATION
    integration = np.empty(mujoco.mj_stateSize(data.model, kind))
    mujoco.mj_getState(data.model, data, integration, kind)
    return {"integration": integration, "arrays": {name: each.copy() for name, each in _mujoco_arrays(data).items()}}


def _write_mujoco_data(data: Any, state: Any) -> None:
    mujoco = _mujoco()
    mujoco.mj_setState(data.model, data, state["integration"], mujoco.mjtState.mjSTATE_INTEGRATION)
    for name, array in _mujoco_arrays(data).items():
        saved = state["arrays"].get(name)
        if saved is not None and saved.shape == array.shape and array.flags.writeable:
            array[...] = saved


def _read_mujoco_model(model: Any) -> str:
    mujoco = _mujoco()
    buffer = np.empty(mujoco.mj_sizeModel(model), np.uint8)
    mujoco.mj_saveModel(model, None, buffer)
    return hashlib.sha256(buffer.tobytes()).hexdigest()


def _read_ale(ale: Any) -> bytes:
    if ale.getFloat("repeat_action_probability") > 0:
        raise UnknownStateError("ALE does not tell which action it repeats with repeat_action_probability > 0")
    data: bytes = ale.cloneSystemState().serialize()
    return data


def _write_ale(ale: Any, state: bytes) -> None:
    ale.restoreSystemState(importlib.import_module("ale_py").ALEState(state))


def _read_table(table: Any) -> str:
    hashes = importlib.import_module("pandas").util.hash_pandas_object(table)
    names = [*table.columns] if hasattr(table, "columns") else table.name
    return hashlib.sha256(hashes.to_numpy().tobytes() + repr(names).encode()).hexdigest()


# By the name of the class
SIMULATORS = {
    "mujoco._structs:MjData": Simulator(_read_mujoco_data, _write_mujoco_data),
    "mujoco._structs:MjModel": Simulator(_read_mujoco_model, None),
    "pandas.core.frame:DataFrame": Simulator(_read_table, None),
    "pandas.core.series:Series": Simulator(_read_table, None),
    "pandas:DataFrame": Simulator(_read_table, None),
    "pandas:Series": Simulator(_read_table, None),
    "ale_py._ale_py:ALEInterface": Simulator(_read_ale, _write_ale),
}
