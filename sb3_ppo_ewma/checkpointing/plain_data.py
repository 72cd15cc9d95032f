"""Numbers, text, arrays and containers of them as bytes, without pickle: reading them cannot run code."""

import io
import json
import zipfile
from typing import Any

import numpy as np

_JSON = "data.json"


class NotPlainError(ValueError):
    """A value is neither a number nor text, array or container of them."""


def dumps(value: Any) -> bytes:
    """
    :param value: ``None``, numbers, text, bytes, NumPy arrays and scalars, and lists, tuples and dictionaries of them
    :return: a zip archive with one JSON file and the arrays, each with a checksum; the same for equal values
    :raises NotPlainError: if there is anything else in it, an array of objects for example
    """
    arrays: list[np.ndarray] = []
    text = json.dumps(_encoded(value, arrays))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(zipfile.ZipInfo(_JSON), text)  # without the time of writing
        for index, array in enumerate(arrays):
            with archive.open(zipfile.ZipInfo(f"{index}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
    return file.getvalue()


def loads(data: bytes) -> Any:
    """
    :param data: from :func:`dumps`
    :return: the value
    :raises ValueError: if the data are damaged
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return _decoded(json.loads(archive.read(_JSON)), archive)
    except (zipfile.BadZipFile, KeyError, TypeError, EOFError) as error:
        raise ValueError(f"damaged data: {type(error).__name__}: {error}") from error


def _encoded(value: Any, arrays: list[np.ndarray]) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, np.ndarray | np.generic):
        array = np.asarray(value)
        if array.dtype.hasobject:
            raise NotPlainError("an array of objects")
        arrays.append(array)
        return {"array" if isinstance(value, np.ndarray) else "scalar": len(arrays) - 1}
    if type(value) is bytes:
        arrays.append(np.frombuffer(value, np.uint8))
        return {"bytes": len(arrays) - 1}
    if type(value) is list:
        return [_encoded(each, arrays) for each in value]
    if type(value) is tuple:
        return {"tuple": [_encoded(each, arrays) for each in value]}
    if type(value) is dict:
        return {"items": [[_encoded(key, arrays), _encoded(each, arrays)] for key, each in value.items()]}
    raise NotPlainError(f"{type(value).__module__}.{type(value).__qualname__}")


def _decoded(value: Any, archive: zipfile.ZipFile) -> Any:
    if isinstance(value, list):
        return [_decoded(each, archive) for each in value]
    if not isinstance(value, dict):
        return value
    [(kind, content)] = value.items()
    if kind == "items":
        return {_decoded(key, archive): _decoded(each, archive) for key, each in content}
    if kind == "tuple":
        return tuple(_decoded(each, archive) for each in content)
    array = np.lib.format.read_array(io.BytesIO(archive.read(f"{int(content)}.npy")), allow_pickle=False)
    if kind == "bytes":
        return array.tobytes()
    return array if kind == "array" else array[()]
