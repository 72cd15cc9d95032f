"""
Export trained policies to files that act without Stable-Baselines3: ONNX, or a program of ``torch.export``. A file is
written only if it acts as ``predict`` does.
"""

import contextlib
import copy
import importlib
import inspect
import io
import json
import logging
import os
import pathlib
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import gymnasium as gym
import numpy as np
import stable_baselines3
import torch as th
from gymnasium import spaces
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.vec_env import (
    VecCheckNan,
    VecEnv,
    VecEnvWrapper,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
    VecVideoRecorder,
)
from torch import nn
from torch.distributions import Bernoulli, Categorical, Distribution, Normal

from sb3_ppo_ewma._arguments import check_integer
from sb3_ppo_ewma.checkpointing.atomic import replace_atomically
from sb3_ppo_ewma.distributions import torch_distributions
from sb3_ppo_ewma.policies import copy_policy

# Largest |a − b| / max(1, |b|) between a number of the file and one of predict()
TOLERANCE = 1e-5
FORMATS = (".onnx", ".pt2")
METADATA_FILE = "metadata.json"  # in a file of torch.export

# Bounds of observations that are this far apart are no limits of what occurs.
_WIDE = 1e4

# Wrappers that pass observations on as they are
_UNCHANGING = (VecCheckNan, VecMonitor, VecVideoRecorder)
_BATCH = "batch"
_STATES = ("hidden_state", "cell_state")

# The random numbers that torch's distributions draw, by the kind of distribution
_NOISE: dict[type[Distribution], tuple[str, Callable[[int, int], th.Tensor]]] = {
    Normal: ("standard normal", lambda *shape: th.normal(th.zeros(shape), th.ones(shape))),
    Categorical: ("exponential with scale 1", lambda *shape: th.empty(shape).exponential_()),
    Bernoulli: ("uniform in [0, 1)", lambda *shape: th.rand(shape)),
}

Arrays = dict[str, np.ndarray]
Layer = VecNormalize | VecTransposeImage


class Field(NamedTuple):
    """
    An input or output of the file.

    :param dtype: NumPy's name of the type of its numbers
    :param shape: with ``"batch"`` for the number of observations
    :param meaning: what it is
    """

    dtype: str
    shape: tuple[int | str, ...]
    meaning: str


class ExportError(ValueError):
    """A policy cannot be exported, or the file would not act as ``predict`` does."""


class Proof(NamedTuple):
    """
    How a file compares with ``predict``.

    :param n_observations: number of observations
    :param differences: largest |a − b| / max(1, |b|) of each output, b from ``predict``; of discrete actions 0
    :param n_ties: discrete actions that differ and are equally likely up to rounding
    """

    n_observations: int
    differences: dict[str, float]
    n_ties: int

    def __str__(self) -> str:
        listed = ", ".join(
            f"{name} {difference:.1e}" if difference else f"{name} 0" for name, difference in self.differences.items()
        )
        text = f"largest difference to predict on {self.n_observations} observations: {listed}"
        return f"{text}; {self.n_ties} with another, equally likely action" if self.n_ties else text


def export_policy(
    model: OnPolicyAlgorithm,
    path: str | pathlib.Path,
    env: VecEnv | None = None,
    *,
    vec_normalize: VecNormalize | str | pathlib.Path | None = None,
    deterministic: bool = True,
    n_observations: int = 1000,
    env_id: str | None = None,
) -> Proof:
    """
    Write a file that maps observations to the actions of ``model.predict``, and more: it normalises observations as
    ``VecNormalize`` does, which ``predict`` leaves to the environment.

    :param model: PPO, A2C or any algorithm of this package or sb3-contrib that is on-policy, on the CPU
    :param path: ``.onnx`` or ``.pt2`` (``torch.export``)
    :param env: environments, wrapped as for ``predict``, in which the file is compared with it. They are reset and
        stepped. ``None``: random observations, of the spaces and with the statistics of ``model.get_env()``
    :param vec_normalize: without ``env``, statistics of observations, or the file they were saved to, which can run
        code as every pickle
    :param deterministic: whether the file takes the most likely actions, or has the random numbers as an input
    :param n_observations: smallest number of observations to compare with ``predict``
    :param env_id: name of the environment for the file's metadata; ``None``: of its specification
    :return: how the file compares
    :raises ExportError: if the policy cannot be exported, or the file would not act as ``predict``; nothing is written
    :raises ValueError: if an argument is not possible
    :raises ImportError: if a package that ONNX needs is missing
    """
    path = pathlib.Path(path)
    _check(model, path, env, vec_normalize, n_observations)
    space, layers = _observed(model, env, vec_normalize)
    metadata = {"env_id": _id_of(env) if env_id is None else env_id}
    module, data, run = _exported(model, space, layers, deterministic, path.suffix, metadata)
    source = _Samples(module) if env is None else cast(Any, layers[-1].venv if layers else env)
    proof = prove(run, module, source, n_observations)
    with replace_atomically(path) as temporary:
        temporary.write_bytes(data)
    return proof


def _exported(
    model: Any,
    space: spaces.Space[Any],
    layers: list[Layer],
    deterministic: bool,
    suffix: str,
    metadata: dict[str, str],
) -> tuple["ExportablePolicy", bytes, Callable[[Arrays], Arrays]]:
    """
    :return: what was exported, as a module, as the content of the file, and as the file's function of named inputs
    """
    to_file, open_file = (_to_onnx, _open_onnx) if suffix == ".onnx" else (_to_pt2, _open_pt2)
    try:
        module = ExportablePolicy(model, space, layers, deterministic)
        with _quiet():
            data = to_file(module, {**_metadata(module), **metadata})
            return module, data, open_file(data)
    except (ImportError, ExportError):
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ExportError(f"{model.policy_class.__name__} cannot be exported: {reason}") from error


def _check(model: Any, path: pathlib.Path, env: Any, vec_normalize: Any, n_observations: int) -> None:
    if not isinstance(model, OnPolicyAlgorithm):
        raise ValueError(f"model must be an on-policy algorithm, such as PPO, got {type(model).__name__}")
    if model.device.type != "cpu":
        raise ValueError(f"model must be on the CPU (load it with device='cpu'), got {model.device}")
    if path.suffix not in FORMATS:
        raise ValueError(f"path must end in {' or '.join(FORMATS)}, got {path}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"path must be in a folder that exists, got {path}")
    if env is not None and vec_normalize is not None:
        raise ValueError("vec_normalize must be None where env is given, whose statistics are used")
    if env is not None and not isinstance(env, VecEnv):
        raise TypeError(f"env must be a VecEnv, got {type(env).__name__}")
    check_integer("n_observations", n_observations, minimum=1)


def _id_of(env: VecEnv | None) -> str:
    spec = env.get_attr("spec", 0)[0] if env is not None and env.has_attr("spec") else None
    return str(getattr(spec, "id", ""))


# === What the observations of the file are ===


def _observed(model: Any, env: VecEnv | None, vec_normalize: Any) -> tuple[spaces.Space[Any], list[Layer]]:
    """
    :param model: the model
    :param env: environments
    :param vec_normalize: as in :func:`export_policy`
    :return: space of the observations that the file takes, and the wrappers whose work it does, the outermost first
    :raises ValueError: if it cannot do their work
    """
    own = model.policy.observation_space
    if vec_normalize is None:
        env = model.get_env() if env is None else env
        if env is None:
            return own, []
        given = _spaces(env.observation_space)
        _check_shapes("env", own, {key: given[key].shape if key in given else None for key in _spaces(own) | given})
        layers = _layers(env)
        return (layers[-1].venv if layers else env).observation_space, layers
    if isinstance(vec_normalize, str | pathlib.Path):
        with open(vec_normalize, "rb") as file:
            vec_normalize = pickle.load(file)
    if not isinstance(vec_normalize, VecNormalize):
        raise TypeError(f"vec_normalize must be a VecNormalize, got {type(vec_normalize).__name__}")
    if not vec_normalize.norm_obs:
        return own, []
    _check_shapes("vec_normalize", own, {key: each.mean.shape for key, each in _statistics(vec_normalize).items()})
    return own, [vec_normalize]


def _check_shapes(name: str, space: spaces.Space[Any], shapes: dict[str, Any]) -> None:
    for key, shape in shapes.items():
        needed = _spaces(space).get(key)
        fits = needed is not None and (
            shape == needed.shape
            or (shape is not None and is_image_space(needed) and needed.shape == (shape[-1], *shape[:-1]))
        )
        if not fits:
            of_key = f" for {key}" if key else ""
            raise ValueError(f"{name} must be for the model's observations {space}, but has shape {shape}{of_key}")


def _layers(env: VecEnv) -> list[Layer]:
    found: list[Layer] = []
    between: VecEnvWrapper | None = None
    each = env
    while isinstance(each, VecEnvWrapper):
        is_normalizing = isinstance(each, VecNormalize) and each.norm_obs
        if is_normalizing and between is not None:
            raise ExportError(
                f"env normalises observations inside {type(between).__name__}, which the file cannot do; VecNormalize "
                f"around {type(between).__name__} can be exported"
            )
        if is_normalizing or (isinstance(each, VecTransposeImage) and not each.skip and between is None):
            found.append(cast(Layer, each))
        elif not isinstance(each, (*_UNCHANGING, VecNormalize, VecTransposeImage)):
            between = between or each
        each = each.venv
    return found


def _spaces(space: spaces.Space[Any]) -> dict[str, spaces.Space[Any]]:
    """
    :param space: space of observations
    :return: the spaces of its keys; of a space without keys itself, with the key ""
    """
    return dict(space.spaces) if isinstance(space, spaces.Dict) else {"": space}


def _statistics(layer: Layer) -> dict[str, Any]:
    if not isinstance(layer, VecNormalize):
        return {}
    return dict(layer.obs_rms) if isinstance(layer.obs_rms, dict) else {"": layer.obs_rms}


def _input_name(key: str) -> str:
    return f"observation.{key}" if key else "observation"


# === What the file computes ===


class ExportablePolicy(nn.Module):
    """
    What ``predict`` and the wrappers below it do, as a function of the tensors that :attr:`inputs` describes.

    :param model: the model, whose policy is copied
    :param space: space of the observations
    :param layers: wrappers of the environment that work on observations, the outermost first
    :param deterministic: whether to take the most likely actions
    :raises ExportError: if the policy cannot act from random numbers that it is given
    """

    def __init__(self, model: Any, space: spaces.Space[Any], layers: list[Layer], deterministic: bool) -> None:
        super().__init__()
        self.model, self.space, self.layers, self.deterministic = model, space, layers, deterministic
        self.policy = copy_policy(model.policy)
        self.is_recurrent = hasattr(self.policy, "lstm_actor")
        self.takes_masks = "action_masks" in inspect.signature(model.predict).parameters
        if self.is_recurrent:
            self.policy._process_sequence = _process_step
        self.noise: list[tuple[type[Distribution], int]] = []
        self.inputs = self._inputs()
        if not deterministic:
            self._find_noise()
        self.outputs = self._outputs()

    def _inputs(self) -> dict[str, Field]:
        is_normalised = any(isinstance(layer, VecNormalize) for layer in self.layers)
        meaning = "observations before VecNormalize" if is_normalised else "observations as predict takes them"
        fields = {
            _input_name(key): Field(str(space.dtype), (_BATCH, *cast(Any, space.shape)), meaning)
            for key, space in _spaces(self.space).items()
        }
        if self.takes_masks:
            fields["action_masks"] = Field("bool", (_BATCH, sum(self.mask_sizes())), "which actions are valid")
        if self.is_recurrent:
            lstm = self.policy.lstm_actor
            shape = (lstm.num_layers, _BATCH, lstm.hidden_size)
            fields["hidden_state"] = Field("float32", shape, "hidden state of the LSTM, at first 0")
            fields["cell_state"] = Field("float32", shape, "cell state of the LSTM, at first 0")
            fields["episode_start"] = Field("bool", (_BATCH,), "which observations begin episodes: their state is 0")
        return fields

    def _outputs(self) -> dict[str, Field]:
        action = self(self.example())["action"]
        meaning = f"actions of {self.policy.action_space}, as predict returns them"
        fields = {"action": Field(str(action.numpy().dtype), (_BATCH, *action.shape[1:]), meaning)}
        for name in _STATES if self.is_recurrent else ():
            given = self.inputs[name]
            fields[f"next_{name}"] = given._replace(meaning=f"{name} for the next observations")
        return fields

    def mask_sizes(self) -> list[int]:
        """
        :return: number of values of each action that has a mask
        """
        # Models with masks need sb3-contrib, others do without.
        from sb3_ppo_ewma.contrib.masking import mask_sizes

        return mask_sizes(self.policy.action_space)

    def _find_noise(self) -> None:
        name = type(self.policy.action_dist).__name__
        if getattr(self.policy, "use_sde", False):
            raise ExportError(
                "random actions cannot be exported with gSDE: predict takes their noise from a matrix that training "
                "drew last; export deterministic actions"
            )
        distribution, _ = self.distribution(self.example())
        for each in torch_distributions(distribution, "exporting a stochastic policy"):
            kind = next((kind for kind in _NOISE if isinstance(each, kind)), None)
            parameters = each.mean if kind is Normal else getattr(each, "probs", None)
            if kind is None or parameters is None or parameters.dim() != 2:
                raise ExportError(f"random actions of {name} cannot be exported: it draws from {type(each).__name__}")
            self.noise.append((kind, int(parameters.shape[1])))
        meanings = {_NOISE[kind][0] for kind, _ in self.noise}
        if len(meanings) > 1:
            raise ExportError(
                f"random actions of {name} cannot be exported: it draws from several kinds of distribution"
            )
        shape = (_BATCH, sum(size for _, size in self.noise))
        self.inputs["noise"] = Field("float32", shape, f"random numbers, independent: {meanings.pop()}")

    def draw_noise(self, batch_size: int) -> th.Tensor:
        """
        :param batch_size: number of observations
        :return: (batch_size, n) the random numbers that ``predict`` draws with the same state of torch's generator
        """
        return th.cat([_NOISE[kind][1](batch_size, size) for kind, size in self.noise], dim=1)

    def example(self) -> dict[str, th.Tensor]:
        """
        :return: some inputs, of two observations
        """
        return {
            name: th.as_tensor(np.ones([2 if size == _BATCH else int(size) for size in shape], dtype))
            for name, (dtype, shape, _) in self.inputs.items()
        }

    def forward(self, inputs: dict[str, th.Tensor]) -> dict[str, th.Tensor]:
        """
        :param inputs: by the names of :attr:`inputs`
        :return: by the names of :attr:`outputs`
        """
        distribution, states = self.distribution(inputs)
        if not self.deterministic:
            _draw_from(torch_distributions(distribution, "exporting a stochastic policy"), inputs["noise"])
        outputs = {"action": self._in_space(distribution.get_actions(deterministic=self.deterministic))}
        return {**outputs, **{f"next_{name}": state for name, state in zip(_STATES, states, strict=False)}}

    def distribution(self, inputs: Mapping[str, th.Tensor]) -> tuple[Any, tuple[th.Tensor, ...]]:
        """
        :param inputs: by the names of :attr:`inputs`
        :return: SB3's action distribution; next states of the LSTM, if there is one
        """
        masks = {"action_masks": inputs["action_masks"]} if self.takes_masks else {}
        with _without_validation():
            observation = self._observation(inputs)
            if not self.is_recurrent:
                return self.policy.get_distribution(observation, **masks), ()
            states = tuple(inputs[name] for name in _STATES)
            distribution, states = self.policy.get_distribution(
                observation, states, inputs["episode_start"].float(), **masks
            )
            return distribution, states

    def _observation(self, inputs: Mapping[str, th.Tensor]) -> Any:
        tensors = {key: inputs[_input_name(key)] for key in _spaces(self.space)}
        for layer in reversed(self.layers):
            if isinstance(layer, VecNormalize):
                for key, statistics in _statistics(layer).items():
                    tensors[key] = _normalised(tensors[key], statistics, layer)
            else:
                for key in getattr(layer, "image_space_keys", [""]):
                    tensors[key] = tensors[key].permute(0, 3, 1, 2)
        for key, space in _spaces(self.policy.observation_space).items():
            if is_image_space(space) and tensors[key].shape[1:] != space.shape:
                tensors[key] = tensors[key].permute(0, 3, 1, 2)
            tensors[key] = tensors[key].reshape(-1, *cast(Any, space.shape))
        return tensors if isinstance(self.space, spaces.Dict) else tensors[""]

    def _in_space(self, actions: th.Tensor) -> th.Tensor:
        space = self.policy.action_space
        actions = actions.reshape(-1, *space.shape)
        if not isinstance(space, spaces.Box):
            return actions
        dtype = np.result_type(np.float32, space.dtype)
        low, high = th.as_tensor(space.low.astype(dtype)), th.as_tensor(space.high.astype(dtype))
        if self.policy.squash_output:
            return low + (0.5 * (actions + 1.0) * (high - low))
        return th.minimum(th.maximum(actions, low), high)

    def predict(self, inputs: Arrays, seed: int) -> Arrays:
        """
        What the file has to reproduce: ``model.predict`` on the same inputs.

        :param inputs: by the names of :attr:`inputs`, but without ``noise``, which is added
        :param seed: of the random numbers
        :return: by the names of :attr:`outputs`
        """
        observation: Any = {key: inputs[_input_name(key)] for key in _spaces(self.space)}
        observation = observation if isinstance(self.space, spaces.Dict) else observation[""]
        for layer in reversed(self.layers):
            is_normalizing = isinstance(layer, VecNormalize)
            apply = layer.normalize_obs if is_normalizing else cast(Any, layer).transpose_observations
            observation = apply(observation)
        masks = {"action_masks": inputs["action_masks"]} if self.takes_masks else {}
        state = tuple(inputs[name] for name in _STATES) if self.is_recurrent else None
        with th.random.fork_rng(devices=[]):
            if not self.deterministic:
                th.default_generator.manual_seed(seed)
                inputs["noise"] = self.draw_noise(len(next(iter(inputs.values())))).numpy()
            th.default_generator.manual_seed(seed)
            action, state = self.model.predict(
                observation, state, inputs.get("episode_start"), self.deterministic, **masks
            )
        return {"action": action, **{f"next_{name}": each for name, each in zip(_STATES, state or (), strict=False)}}


def _process_step(
    features: th.Tensor, states: tuple[th.Tensor, th.Tensor], episode_starts: th.Tensor, lstm: nn.LSTM
) -> tuple[th.Tensor, tuple[th.Tensor, th.Tensor]]:
    # sb3-contrib's method, for sequences of one step
    kept = (1.0 - episode_starts).reshape(1, -1, 1)
    output, states = lstm(features.unsqueeze(0), (kept * states[0], kept * states[1]))
    return output.squeeze(0), states


def _normalised(observations: th.Tensor, statistics: Any, layer: VecNormalize) -> th.Tensor:
    # In float64, as VecNormalize
    mean, std = th.as_tensor(statistics.mean), th.as_tensor(np.sqrt(statistics.var + layer.epsilon))
    return th.clamp((observations.double() - mean) / std, -layer.clip_obs, layer.clip_obs).float()


def _draw_from(distributions: list[Distribution], noise: th.Tensor) -> None:
    """
    :param distributions: whose ``sample`` and ``rsample`` shall use the given random numbers as torch uses its own
    :param noise: (batch, n) the random numbers
    """
    start = 0
    for each in cast(list[Any], distributions):
        parameters = each.loc if isinstance(each, Normal) else each.probs
        own = noise[:, start : start + parameters.shape[1]]
        start += parameters.shape[1]
        if isinstance(each, Normal):
            drawn = each.loc + own * each.scale
        elif isinstance(each, Categorical):
            drawn = (each.probs / own).argmax(dim=-1)
        else:
            drawn = (own < each.probs).to(each.probs.dtype)
        each.sample = each.rsample = lambda *_, drawn=drawn: drawn


@contextlib.contextmanager
def _without_validation() -> Iterator[None]:
    # Which would make the graph depend on the values of tensors
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


# === Files ===


def _metadata(module: ExportablePolicy) -> dict[str, str]:
    versions = {
        "sb3-ppo-ewma": importlib.import_module("sb3_ppo_ewma").__version__,
        "stable-baselines3": stable_baselines3.__version__,
        "torch": str(th.__version__),
        "gymnasium": gym.__version__,
    }
    return {
        "algorithm": type(module.model).__name__,
        "policy": type(module.policy).__name__,
        "observation_space": str(module.space),
        "action_space": str(module.policy.action_space),
        "deterministic": json.dumps(module.deterministic),
        "versions": json.dumps(versions),
        "inputs": json.dumps({name: field._asdict() for name, field in module.inputs.items()}),
        "outputs": json.dumps({name: field._asdict() for name, field in module.outputs.items()}),
    }


def _program(module: ExportablePolicy) -> th.export.ExportedProgram:
    dynamic = _batch_axes(module, th.export.Dim(_BATCH, min=1))
    with th.no_grad():
        return th.export.export(module, (module.example(),), dynamic_shapes=dynamic, strict=False)


def _batch_axes(module: ExportablePolicy, size: Any) -> tuple[dict[str, dict[int, Any]]]:
    return ({name: {field.shape.index(_BATCH): size} for name, field in module.inputs.items()},)


def _to_onnx(module: ExportablePolicy, metadata: dict[str, str]) -> bytes:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        _import(package)
    program: Any = th.onnx.export(
        _program(module),
        (),
        dynamo=True,
        input_names=list(module.inputs),
        output_names=list(module.outputs),
        dynamic_shapes=_batch_axes(module, _BATCH),  # for the name of the axis
        verbose=False,
    )
    program.model.metadata_props.update(metadata)
    return bytes(program.model_proto.SerializeToString())


def _open_onnx(data: bytes) -> Callable[[Arrays], Arrays]:
    runtime = _import("onnxruntime")
    session = runtime.InferenceSession(data, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(names, inputs), strict=True))


def _to_pt2(module: ExportablePolicy, metadata: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    th.export.save(_program(module), buffer, extra_files={METADATA_FILE: json.dumps(metadata)})
    return buffer.getvalue()


def _open_pt2(data: bytes) -> Callable[[Arrays], Arrays]:
    loaded = th.export.load(io.BytesIO(data)).module()

    def run(inputs: Arrays) -> Arrays:
        outputs = loaded({name: th.as_tensor(each) for name, each in inputs.items()})
        return {name: each.numpy() for name, each in outputs.items()}

    return run


def _import(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise ImportError(f"exporting to ONNX needs {package}: pip install 'sb3-ppo-ewma[export]'") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # Both exporters report their own progress and deprecations.
    before = logging.root.manager.disable
    with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


# === Proof ===


class _Samples:
    """
    Random observations and masks in place of environments.

    :param module: what they are for
    """

    num_envs = 8

    def __init__(self, module: ExportablePolicy) -> None:
        self._space = copy.deepcopy(module.space)
        self._space.seed(0)
        self._module = module
        self._generator = np.random.default_rng(0)

    def reset(self) -> Any:
        batches = {key: self._batch(key, space) for key, space in _spaces(self._space).items()}
        return batches if isinstance(self._space, spaces.Dict) else batches[""]

    def _batch(self, key: str, space: Any) -> np.ndarray:
        batch = np.stack([space.sample() for _ in range(self.num_envs)])
        if not isinstance(space, spaces.Box) or batch.dtype.kind != "f":
            return batch
        # Where bounds are far apart, samples between them are not what a policy has seen.
        normal = self._generator.normal(size=batch.shape)
        for layer in self._module.layers:
            if key in (statistics := _statistics(layer)):
                normal = statistics[key].mean + normal * np.sqrt(statistics[key].var)
        is_narrow = np.isfinite(space.low) & np.isfinite(space.high) & (space.high / 2 - space.low / 2 < _WIDE)
        return np.where(is_narrow, batch, np.clip(normal, space.low, space.high)).astype(batch.dtype)

    def step(self, _: Any) -> tuple[Any, None, np.ndarray, None]:
        return self.reset(), None, self._generator.random(self.num_envs) < 0.1, None

    def has_attr(self, _: str) -> bool:
        return True

    def env_method(self, _: str) -> np.ndarray:
        masks = []
        for size in self._module.mask_sizes():
            mask = self._generator.random((self.num_envs, size)) < 0.5
            mask[np.arange(self.num_envs), self._generator.integers(size, size=self.num_envs)] = True
            masks.append(mask)
        return np.concatenate(masks, axis=1)


def prove(run: Callable[[Arrays], Arrays], module: ExportablePolicy, env: Any, n_observations: int) -> Proof:
    """
    Act with ``predict``, and compare the file's outputs for the same inputs, in batches and one by one.

    :param run: the file, as a function of named inputs
    :param module: what was exported
    :param env: environments without the wrappers whose work the file does
    :param n_observations: smallest number of observations
    :return: the comparison
    :raises ExportError: if the outputs differ
    """
    if module.takes_masks and not env.has_attr("action_masks"):
        raise ValueError(f"env must have a method action_masks(), which {type(module.model).__name__} needs")
    n_envs, differences, n_ties, seen = env.num_envs, dict.fromkeys(module.outputs, 0.0), 0, 0
    observation, starts = env.reset(), np.ones(n_envs, dtype=bool)
    states = {
        name: np.zeros([n_envs if size == _BATCH else int(size) for size in module.inputs[name].shape], np.float32)
        for name in (_STATES if module.is_recurrent else ())
    }
    while seen < n_observations:
        inputs = _step_inputs(module, env, observation)
        inputs |= {**states, "episode_start": starts} if module.is_recurrent else {}
        first = {name: np.take(each, [0], module.inputs[name].shape.index(_BATCH)) for name, each in inputs.items()}
        expected = module.predict(inputs, seed=seen)
        for batch, wanted in ((inputs, expected), (first, module.predict(first, seed=seen))):
            try:
                got = run(batch)
            except Exception as error:
                raise ExportError(f"the file would not act as predict: it fails with {error}") from error
            for name in differences:
                differences[name] = max(differences[name], _difference(name, got[name], wanted[name], module))
            n_ties += _ties(got["action"], wanted["action"], module, batch)
        states = {name: expected[f"next_{name}"] for name in states}
        seen += n_envs
        observation, _, starts, _ = env.step(expected["action"])
    return Proof(seen, differences, n_ties)


def _step_inputs(module: ExportablePolicy, env: Any, observation: Any) -> Arrays:
    observations = observation if isinstance(observation, dict) else {"": observation}
    inputs = {_input_name(key): np.asarray(each) for key, each in observations.items()}
    if module.takes_masks:
        masks = np.stack(env.env_method("action_masks"))
        inputs["action_masks"] = masks.astype(bool).reshape(env.num_envs, -1)
    return inputs


def _difference(name: str, got: np.ndarray, wanted: np.ndarray, module: ExportablePolicy) -> float:
    kinds = [(each.dtype, each.shape) for each in (got, wanted)]
    if kinds[0] != kinds[1]:
        raise ExportError(f"the file would not act as predict: {name} is {kinds[0]}, of predict {kinds[1]}")
    if name == "action" and not isinstance(module.policy.action_space, spaces.Box):
        return 0.0  # compared by _ties()
    difference = float(np.max(np.abs(got.astype(np.float64) - wanted) / np.maximum(1.0, np.abs(wanted))))
    if not difference <= TOLERANCE:
        raise ExportError(
            f"the file would not act as predict: {name} differs by {difference:.1e}, more than {TOLERANCE}"
        )
    return difference


def _ties(got: np.ndarray, wanted: np.ndarray, module: ExportablePolicy, inputs: Arrays) -> int:
    """
    :param got: actions of the file
    :param wanted: actions of ``predict``
    :param module: what was exported
    :param inputs: their inputs
    :return: number of discrete actions that differ, but are equally likely
    :raises ExportError: if others differ
    """
    differs = np.reshape(got != wanted, (len(got), -1)).any(axis=1)
    if isinstance(module.policy.action_space, spaces.Box) or not differs.any():
        return 0
    n_wrong = int(differs.sum())
    if module.deterministic:
        with th.no_grad():
            distribution, _ = module.distribution({name: th.as_tensor(each) for name, each in inputs.items()})
            gap = distribution.log_prob(th.as_tensor(wanted)) - distribution.log_prob(th.as_tensor(got))
        n_wrong = int((differs & ~(gap.abs().numpy() <= TOLERANCE)).sum())
    if n_wrong:
        raise ExportError(f"the file would not act as predict: action differs in {n_wrong} of {len(got)} observations")
    return int(differs.sum())
