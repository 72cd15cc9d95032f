"""
The files that ``save()`` writes, before SB3 reads them: every byte of them is checked, and where that is asked for,
their objects are read without running code from the file.
"""

import base64
import contextlib
import json
import pathlib
import pickle
import zipfile
from collections.abc import Collection, Iterator, Mapping
from io import BufferedIOBase, BytesIO
from typing import Any, TypeAlias

import torch as th
from stable_baselines3.common.save_util import open_path

from sb3_ppo_ewma._arguments import warn_caller
from sb3_ppo_ewma.checkpointing.restricted_pickle import NotAllowedError, loads
from sb3_ppo_ewma.checkpointing.state_checks import DamagedStateError

SavePath: TypeAlias = str | pathlib.Path | BufferedIOBase

_PICKLED = ":serialized:"
_NEEDED = ("policy_class", "observation_space", "action_space")
_BEGINNING = b"PK\x03\x04"
_VARIABLES = "pytorch_variables.pth"
# A file that claims to unpack to more than this many times its size is no model: SB3 does not compress.
_MOST_TIMES = 100
_SOUND_TORCH = (2, 10)


def name_of(path: SavePath) -> str:
    """
    :param path: file name or open file
    :return: its name for messages
    """
    return str(path if isinstance(path, str | pathlib.Path) else getattr(path, "name", "the open file"))


@contextlib.contextmanager
def naming_file(path: SavePath | dict[str, Any]) -> Iterator[None]:
    """
    Within this context, errors about the contents of a file name it.

    :param path: file name or open file; a dictionary: there is no file to name
    """
    name = "" if isinstance(path, dict) else name_of(path)
    try:
        yield
    except pickle.UnpicklingError as error:
        raise ValueError(f"{name}: a part that must have tensors only has something else: {error}") from error
    except (RuntimeError, ValueError, KeyError) as error:
        if type(error) not in (RuntimeError, ValueError, KeyError, DamagedStateError) or name in str(error):
            raise
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise type(error)(f"{name}: {text}") from error


@contextlib.contextmanager
def opened(path: SavePath) -> Iterator[Any]:
    """
    :param path: file name (``.zip`` is added if needed) or open binary file, which stays open
    :return: the open file, within this context
    """
    file = open_path(path, "r", suffix="zip")
    with contextlib.nullcontext(file) if isinstance(path, BufferedIOBase) else file:
        yield file


def in_memory(path: SavePath) -> BytesIO:
    """
    Copy a file, so that nobody can change it between its check and its use.

    :param path: file name (``.zip`` is added if needed) or open binary file
    :return: its contents
    """
    with opened(path) as file:
        file.seek(0)
        return BytesIO(file.read())


def check_archive(path: SavePath, name: str) -> None:
    """
    Read every byte of a file once and compare the checksums, which neither SB3 nor PyTorch looks at.

    :param path: file name (``.zip`` is added if needed) or open binary file
    :param name: of the file, for the message
    :raises ValueError: if it is not a zip file, or damaged
    """
    with opened(path) as file:
        file.seek(0)
        begins_well, size = file.read(4) == _BEGINNING, file.seek(0, 2)
        try:
            with zipfile.ZipFile(file) as archive:
                # Of a file that was cut off, the end can be that of an archive within it.
                is_whole = min((info.header_offset for info in archive.infolist()), default=0) == 0
                broken = archive.testzip() if is_whole else None
        except zipfile.BadZipFile as error:
            is_whole = zipfile.is_zipfile(file)
            broken = str(error)
        except Exception as error:  # damaged headers provoke almost any error
            raise ValueError(f"{name} is a damaged zip file ({type(error).__name__}: {error})") from error
    if not is_whole:
        cause = (
            f"it begins as one but was cut off after {size} bytes" if begins_well else f"its {size} bytes are not one"
        )
        raise ValueError(f"Error: the file {name} wasn't a zip-file: {cause if size else 'it is empty'}")
    if broken is not None:
        raise ValueError(f"{name} is a damaged zip file: the contents of {broken!r} have changed")


def check_reader_of_tensors() -> None:
    """Warn where files can make PyTorch's reader of tensors run code."""
    version = tuple(int(part) for part in th.__version__.split(".")[:2])
    if version < _SOUND_TORCH:
        warn_caller(
            f"safe=True relies on torch.load(weights_only=True), which files can make run code before PyTorch "
            f"{'.'.join(map(str, _SOUND_TORCH))}, and this is {th.__version__}: "
            "https://github.com/pytorch/pytorch/security/advisories/GHSA-63cw-57p8-fm3p"
        )


def check_sizes(file: BytesIO) -> None:
    """
    Refuse archives, also within archives, that were made to fill the memory.

    :param file: zip file
    :raises ValueError: if it claims to unpack to far more than its size
    """

    def check(archive: zipfile.ZipFile, size: int) -> None:
        claimed = sum(info.file_size for info in archive.infolist())
        if claimed > _MOST_TIMES * size:
            raise ValueError(f"{size} bytes that claim to unpack to {claimed} are no model of save()")

    with zipfile.ZipFile(file) as archive:
        check(archive, file.getbuffer().nbytes)
        for info in archive.infolist():
            with archive.open(info) as member:
                if zipfile.is_zipfile(member):
                    with zipfile.ZipFile(member) as inner:
                        check(inner, info.file_size)


def read_attributes(path: SavePath) -> dict[str, Any]:
    """
    :param path: file name (``.zip`` is added if needed) or open binary file
    :return: the attributes of a saved model as they are in the file, objects still pickled
    :raises ValueError: if it is not a saved model
    """
    with opened(path) as file, zipfile.ZipFile(file) as archive:
        if "data" not in archive.namelist():
            raise ValueError("not a file of save(): it has no member 'data'")
        try:
            attributes = json.loads(archive.read("data"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not a file of save(): its member 'data' is not JSON ({error})") from error
    if not isinstance(attributes, dict):
        raise ValueError("not a file of save(): its member 'data' is not a dictionary")
    missing = [name for name in _NEEDED if name not in attributes]
    if missing:
        raise ValueError(f"not a file of save(), or saved without {', '.join(missing)}")
    return attributes


def read_variable_names(path: SavePath) -> tuple[str, ...]:
    """
    :param path: file name (``.zip`` is added if needed) or open binary file
    :return: names of the tensors outside of modules in the file, which SB3 puts wherever they say
    """
    with opened(path) as file, zipfile.ZipFile(file) as archive:
        if _VARIABLES not in archive.namelist():
            return ()
        with archive.open(_VARIABLES) as member:
            return tuple(th.load(member, map_location="cpu", weights_only=True) or ())


def read_objects(cls: type, attributes: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
    """
    Read the objects of a saved model without running code from the file.

    :param cls: class of the model
    :param attributes: as from :func:`read_attributes`
    :param given: names of the attributes that are not taken from the file
    :return: by name of the attribute, the objects that the file has as pickles
    :raises ValueError: if that is not possible; names the attributes, what they need and how to give it
    """
    objects: dict[str, Any] = {}
    refused: dict[str, str] = {}
    for name, value in attributes.items():
        if name in given:
            continue
        if callable(getattr(cls, name, None)):
            refused[name] = f"would replace a method of {cls.__name__}"
        elif name == "env" and value is not None:
            refused[name] = "would make an environment by its name"
        elif isinstance(value, dict) and _PICKLED in value:
            try:
                objects[name] = loads(base64.b64decode(value[_PICKLED], validate=True))
            except NotAllowedError as error:
                stored = ", a function or class that is stored as code" if "cloudpickle" in str(error) else ""
                refused[name] = f"needs {error}{stored}"
            except (ValueError, TypeError) as error:
                refused[name] = f"is {error}"
    if refused:
        listed = "".join(f"\n  {name} {reason}" for name, reason in refused.items())
        missing = ", ".join(f"{name!r}: ..." for name in refused)
        raise ValueError(
            f"safe=True cannot take all from this file:{listed}\nGive these yourself, custom_objects={{{missing}}}, or "
            "use safe=False if you trust whoever wrote the file, which can then run code."
        )
    return objects
