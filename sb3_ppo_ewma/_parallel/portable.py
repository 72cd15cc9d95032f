"""An algorithm as bytes, with what collecting rollouts needs, for a process that has its environments already."""

import copy
import inspect
import io
import pickle
from typing import Any

import cloudpickle
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, unwrap_vec_normalize

from sb3_ppo_ewma._parallel.shared_memory import arrays_of

_ENVIRONMENTS = "environments"


def dump_for_collection(model: Any) -> bytes:
    """
    :param model: the algorithm
    :return: its attributes but policy, optimisers and the data of rollouts; its environments' wrappers
    :raises TypeError: if an attribute or a wrapper cannot be pickled
    """
    left_out = {*model._excluded_save_params(), "ep_info_buffer", "ep_success_buffer"}
    state = {name: value for name, value in vars(model).items() if name not in left_out}
    buffer = copy.copy(model.rollout_buffer)
    for name in {name.partition("/")[0] for name in arrays_of(buffer)}:
        delattr(buffer, name)
    file = io.BytesIO()
    try:
        content = type(model), state, buffer, model.env, type(model._engines)
        _Pickler(file, model.env.unwrapped).dump(content)
    except Exception as error:
        raise TypeError(
            "collection in the process of RemoteVecEnv needs an algorithm and wrappers that can be pickled: "
            f"{type(error).__name__}: {error}"
        ) from error
    return file.getvalue()


def load_for_collection(data: bytes, env: VecEnv) -> Any:
    """
    :param data: from :func:`dump_for_collection`
    :param env: the innermost environments
    :return: the algorithm
    """
    cls, state, buffer, wrapped, engines = _Unpickler(data, env).load()
    model = object.__new__(cls)
    vars(model).update(state)
    buffer.reset()
    model.rollout_buffer, model.env, model._engines = buffer, wrapped, engines()
    model._vec_normalize_env = unwrap_vec_normalize(wrapped)
    return model


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    def __init__(self, file: io.BytesIO, env: VecEnv) -> None:
        super().__init__(file)
        self._env = env

    def persistent_id(self, value: Any) -> str | None:
        return _ENVIRONMENTS if value is self._env else None

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, VecEnvWrapper):
            # The class's own way, as VecNormalize's, leaves out what is wrapped.
            state = {name: each for name, each in vars(value).items() if name != "class_attributes"}
            return _wrapper, (type(value), state)
        return super().reducer_override(value)


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, env: VecEnv) -> None:
        super().__init__(io.BytesIO(data))
        self._env = env

    def persistent_load(self, reference: str) -> VecEnv:
        return self._env


def _wrapper(cls: type[VecEnvWrapper], state: dict[str, Any]) -> VecEnvWrapper:
    wrapper = cls.__new__(cls)
    vars(wrapper).update(state, class_attributes=dict(inspect.getmembers(cls)))
    return wrapper
