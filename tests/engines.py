"""
Generated trainings for comparing engines: algorithms, policies, spaces, hyper-parameters and customisations in random
combinations, each of them small.
"""

import contextlib
import os
import random
import shutil
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.preprocessing import preprocess_obs
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import _dynamo, nn

from sb3_ppo_ewma import (
    PPG,
    PPGEWMA,
    PPOEWMA,
    AuxiliaryPhaseMixin,
    ImpalaCNN,
    MaskablePPG,
    MaskablePPGEWMA,
    MaskablePPOEWMA,
    MaskableRecurrentPPG,
    MaskableRecurrentPPGEWMA,
    MaskableRecurrentPPOEWMA,
    RecurrentPPG,
    RecurrentPPGEWMA,
    RecurrentPPOEWMA,
    SmallGridCNN,
    rollouts,
)
from sb3_ppo_ewma._engine import dense, fused, microbatches, recognition, standard
from tests.battery.envs import OBSERVATION_SPACES, VECTOR, SpaceEnv, copies
from tests.battery.helpers import record_log
from tests.customizations import CUSTOMIZATIONS, Customization

COMPILERS = (os.environ.get("CXX", "g++"), "clang++")
needs_compiler = pytest.mark.skipif(
    not hasattr(_dynamo.config, "trace_autograd_ops") or not any(map(shutil.which, COMPILERS)),
    reason="needs a C++ compiler and a torch that can compile a backward pass",
)
# From the fastest to the slowest
ENGINES = ("compiled dense", "compiled", "dense", "microbatches", "sequences", "standard", "fused", "reference")

SMALL_IMAGE = spaces.Box(0, 255, (8, 8, 2), np.uint8)
IMAGE = spaces.Box(0, 255, (3, 36, 36), np.uint8)
SMALL_DICT = spaces.Dict({"image": IMAGE, "vector": VECTOR, "discrete": spaces.Discrete(4)})
VECTOR_DICT = spaces.Dict({"vector": VECTOR, "discrete": spaces.Discrete(4)})
VECTORS = ("vector", "vector_float64", "matrix", "discrete", "multidiscrete", "multibinary", "multibinary_matrix")
SPACES: dict[str, spaces.Space[Any]] = {
    **{name: OBSERVATION_SPACES[name] for name in VECTORS},
    "image": IMAGE,
    "small_image": SMALL_IMAGE,
    "dict": SMALL_DICT,
    "vector_dict": VECTOR_DICT,
}
ACTIONS = ("discrete", "box", "box_matrix", "multidiscrete", "multibinary")


def falling(start: float, end: float) -> Callable[[float], float]:
    """:return: a schedule, linear in the remaining progress"""
    return lambda progress: end + (start - end) * progress


# By argument of the algorithms, values that some of the cases have. No clip range of 0 and no cap of 1: where old and
# new policy are equal, rounding decides on which side a sample is.
ARGUMENTS: dict[str, list[Any]] = {
    "clip_range": [0.01, 0.05, 0.5, None, falling(0.3, 0.01)],
    "clip_range_vf": [0.05, 0.5, falling(0.5, 0.05)],
    "ent_coef": [0.1, 0.01, -0.05],
    "vf_coef": [0.0, 0.25, 1.3],
    "kl_coef": [0.1, 1.0, 3.0],
    "max_importance_ratio": [None, 1.01, 1.05, 2.0],
    "advantage_decay": [None, 0.0, 0.5],
    "n_epochs": [1, 3, 4],
    "n_epochs_value": [1, 3],
    "recompute_advantages": [True],
    "staleness": [1, 2],
    "prox_decay": [None, "auto", 0.0, 0.5, 0.9, 0.99],
    "target_kl": [1e-5, 1e-3, 0.01],
    "max_grad_norm": [0.0, 0.01, 0.1, float("inf")],
    "batch_size": [3, 5, 6, 7, 8, 15, 16, 64],
    "learning_rate": [1e-3, 0.003, falling(0.02, 1e-4)],
    "gamma": [0.0, 0.9],
    "gae_lambda": [0.0, 1.0],
}
POLICY_ARGUMENTS: dict[str, list[Any]] = {
    "net_arch": [[], [6, 5], {"pi": [7], "vf": [4, 3]}, {"pi": [], "vf": [4]}, {"pi": [5], "vf": []}],
    "activation_fn": [nn.ReLU, nn.ReLU, nn.ReLU, nn.ELU, nn.GELU, nn.LeakyReLU, nn.SiLU, nn.Sigmoid, nn.Softplus],
    "ortho_init": [False],
    "log_std_init": [-1.0, 0.5],
    "optimizer_kwargs": [
        {"eps": 0.1, "weight_decay": 0.1},
        {"eps": 1e-4, "betas": (0.5, 0.8), "weight_decay": 0.01},
        {"eps": 1e-3, "betas": (0.0, 0.99)},
        {"eps": 1e-5, "amsgrad": True},
        {"eps": 1e-5, "fused": True},
    ],
}
# Where a gradient is 0 but for rounding, Adam multiplies it by lr/eps. In auxiliary phases, which begin with a KL
# divergence of 0, that would be the gradient of the next step, and rounding would grow from step to step.
PHASIC_OPTIMIZERS: list[dict[str, Any]] = [{"eps": 0.1, "betas": (0.5, 0.8), "weight_decay": 0.1}, {"eps": 0.02}]
PHASES: dict[str, list[Any]] = {
    "n_policy_iterations": [1, 2],
    "n_aux_epochs": [0, 1, 2],
    "aux_batch_size": [5, 8, 64],
    "aux_learning_rate": [1e-3, falling(0.01, 1e-4)],
    "beta_clone": [0.0, 0.3, 2.0],
    "vf_true_coef": [0.0, 2.0],
    "vf_aux_coef": [0.0, 3.0],
}
MASKABLE_RECURRENT = (MaskableRecurrentPPOEWMA, MaskableRecurrentPPG, MaskableRecurrentPPGEWMA)
MASKABLE = (MaskablePPOEWMA, MaskablePPG, MaskablePPGEWMA, *MASKABLE_RECURRENT)
RECURRENT = (RecurrentPPOEWMA, RecurrentPPG, RecurrentPPGEWMA, *MASKABLE_RECURRENT)
LSTMS: list[dict[str, Any]] = [
    {},
    {"enable_critic_lstm": False},
    {"enable_critic_lstm": False, "shared_lstm": True},
    {"n_lstm_layers": 2},
    {"n_lstm_layers": 2, "lstm_kwargs": {"dropout": 0.5}},
    {"lstm_kwargs": {"bias": False}},
]
SMALL_NETWORKS: list[tuple[Any, dict[str, Any]]] = [
    (SmallGridCNN, {"channels": (4,)}),
    (ImpalaCNN, {"channels": (3, 4), "n_blocks": 1}),
]
OPTIMIZERS: list[tuple[Any, dict[str, Any]]] = [
    (th.optim.SGD, {"momentum": 0.5}),
    (th.optim.AdamW, {}),
    (th.optim.RMSprop, {"alpha": 0.9}),
]


class MaskedEnv(SpaceEnv):
    """A :class:`SpaceEnv` in which another action is ruled out at every step."""

    def action_masks(self) -> list[bool]:
        space = self.action_space
        if isinstance(space, spaces.MultiDiscrete):
            sizes = list(space.nvec)
        else:
            sizes = [space.n] if isinstance(space, spaces.Discrete) else [2] * space.n
        return [i != (self.n_steps + j) % size for j, size in enumerate(map(int, sizes)) for i in range(size)]


class MixingExtractor(BaseFeaturesExtractor):
    """
    Samples depend on each other, on random numbers and on running statistics.

    :param observation_space: of vectors
    """

    def __init__(self, observation_space: spaces.Box) -> None:
        n_inputs = int(np.prod(observation_space.shape))
        super().__init__(observation_space, 6)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(n_inputs, 6), nn.BatchNorm1d(6), nn.Dropout(0.3))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        features: th.Tensor = self.layers(observations)
        return features


class OwnExtractor(BaseFeaturesExtractor):
    """
    Nothing is known of it.

    :param observation_space: of vectors
    """

    def __init__(self, observation_space: spaces.Box) -> None:
        n_inputs = int(np.prod(observation_space.shape))
        super().__init__(observation_space, 6)
        self.layer = nn.Linear(n_inputs, 6)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return th.sin(self.layer(observations.flatten(1)))


class NoisyExtractor(OwnExtractor):
    """Draws random numbers also in evaluation."""

    def forward(self, observations: th.Tensor) -> th.Tensor:
        features = super().forward(observations)
        return features + 0.1 * th.randn_like(features)


@dataclass
class Case:
    """
    One training.

    :param number: which it is
    :param cls: the algorithm
    :param policy: name of its policy
    :param observations: name of the observation space
    :param actions: name of the action space
    :param n_envs: number of environments
    :param is_double: whether it computes in double precision
    :param arguments: arguments of the algorithm
    :param policy_arguments: arguments of the policy
    :param customization: name of a customisation, empty: none
    """

    number: int
    cls: Any
    policy: str
    observations: str
    actions: str
    n_envs: int = 1
    is_double: bool = True
    arguments: dict[str, Any] = field(default_factory=dict)
    policy_arguments: dict[str, Any] = field(default_factory=dict)
    customization: str = ""

    @property
    def learning_rate(self) -> float:
        """:return: the largest of all optimisers"""
        rates = [self.arguments["learning_rate"], self.arguments.get("aux_learning_rate", 0.0)]
        return max(rate(1.0) if callable(rate) else rate for rate in rates)

    def make(self, engine: str, torch_compile: bool = False) -> Any:
        """
        :param engine: parameter of the model
        :param torch_compile: parameter of the model
        :return: the model, customised
        """
        change = self.change
        env_class = MaskedEnv if self.cls in MASKABLE else SpaceEnv
        env = DummyVecEnv(copies(lambda: env_class(SPACES[self.observations], self.actions, 5), self.n_envs))
        if self.is_double:
            env.buf_rews = env.buf_rews.astype(np.float64)
        cls = self.cls if change.model is None else type("Customized", (change.model, self.cls), {})
        policy: Any = self.policy
        if change.policy is not None:
            policy = type("Customized", (change.policy, self.cls.policy_aliases[self.policy]), {})
        kwargs = deepcopy({**self.arguments, "policy_kwargs": self.policy_arguments})
        own = {
            "engine": engine,
            "torch_compile": torch_compile,
            "seed": self.number,
            "device": "cpu",
            **change.model_kwargs,
        }
        # Some features extractors measure their size with an observation in single precision.
        with patch.object(th.Tensor, "float", th.Tensor.double) if self.is_double else contextlib.nullcontext():
            return cls(policy, env, **kwargs, **own)

    def engine(self, torch_compile: bool = False) -> str:
        """
        :param torch_compile: parameter of the model
        :return: name of the engine of its first training
        """
        with small_limits(), double_precision() if self.is_double else contextlib.nullcontext():
            model = self.make("auto", torch_compile)
            if self.change.moment == "start":
                self.change.apply(model)
            return str(model.current_engine)

    @property
    def change(self) -> Customization:
        """:return: what is customised"""
        return CUSTOMIZATIONS[self.customization] if self.customization else Customization()

    def __str__(self) -> str:
        return f"{self.number}-{self.cls.__name__}-{self.observations}-{self.actions}-{self.customization or 'plain'}"


def generate(number: int) -> Case:
    """
    :param number: seed
    :return: the case
    """
    draw = random.Random(number)
    kind = draw.choices(
        ("vector", "phasic", "image", "sde", "extractor", "optimizer", "recurrent", "maskable"),
        (38, 17, 14, 4, 5, 6, 12, 6),
    )[0]
    has_images = kind == "image" or (kind in ("phasic", "maskable") and draw.random() < 0.2)
    if has_images:
        observations = draw.choice(("image", "small_image", "small_image", "small_image", "dict"))
    else:
        observations = draw.choice(("vector", "vector", *VECTORS, "vector_dict"))
    actions = draw.choice(ACTIONS)
    cls: Any = PPOEWMA
    if kind == "phasic" or (kind == "image" and draw.random() < 0.3):
        cls = draw.choice((PPG, PPGEWMA))
    elif kind == "recurrent":
        cls = draw.choice((RecurrentPPOEWMA, RecurrentPPOEWMA, *RECURRENT))
        if observations == "multidiscrete" and cls is RecurrentPPOEWMA:
            observations = "vector"  # SB3 counts its features in numpy integers, which torch's LSTM refuses
    elif kind == "maskable":
        cls = draw.choice((MaskablePPOEWMA, MaskablePPG, MaskablePPGEWMA))
    if cls in MASKABLE:
        actions = draw.choice(("discrete", "multidiscrete", "multibinary"))
    if kind == "sde":
        actions = "box"
    if kind == "extractor":
        observations = "matrix"
    case = Case(number, cls, _policy_name(cls, observations), observations, actions)
    case.n_envs = draw.choice((1, 1, 2))
    # sb3-contrib's buffers keep the states of an LSTM in single precision.
    # Convolutions round so much that clips and activations differ, and with them what follows.
    case.is_double = (draw.random() < 0.7 or has_images) and cls not in RECURRENT
    _draw_arguments(draw, case)
    _draw_policy_arguments(draw, case, kind)
    if number % 5 in (1, 3) and kind not in ("extractor", "optimizer"):
        _customize(draw, case)
    return case


def _customize(draw: random.Random, case: Case) -> None:
    names = list(CUSTOMIZATIONS)
    name = names[(case.number // 5 * 2 + (case.number % 5 == 3)) % len(names)]  # each in turn
    if not CUSTOMIZATIONS[name].fits(case):
        name = draw.choice([name for name in names if CUSTOMIZATIONS[name].fits(case)])
    case.customization = name
    if CUSTOMIZATIONS[name].needs_layers:
        case.policy_arguments["net_arch"] = [8]


def _policy_name(cls: Any, observations: str) -> str:
    kind = {"image": "Cnn", "small_image": "Cnn", "dict": "MultiInput", "vector_dict": "MultiInput"}
    return kind.get(observations, "Mlp") + ("LstmPolicy" if cls in RECURRENT else "Policy")


def _some(draw: random.Random, options: dict[str, list[Any]], share: float) -> dict[str, Any]:
    return {name: draw.choice(values) for name, values in options.items() if draw.random() < share}


def _draw_arguments(draw: random.Random, case: Case) -> None:
    given: dict[str, Any] = {"n_steps": draw.choice((16, 17)), "batch_size": 8, "n_epochs": 2, "learning_rate": 0.01}
    given |= _some(draw, ARGUMENTS, 0.25)
    if draw.random() < 0.15:
        given |= {"normalize_advantage": False, "advantage_decay": None}
    if given.get("kl_coef") and draw.random() < 0.4:
        given["kl_estimator"] = "analytic"
    if "staleness" in given:
        given["staleness_mode"] = draw.choice(("decoupled", "behavior", "proximal"))
    if given.get("kl_estimator") == "analytic" and given.get("staleness_mode") == "behavior":
        given["prox_decay"] = 0.5  # refused without an EWMA
    if issubclass(case.cls, AuxiliaryPhaseMixin):
        given |= {"n_policy_iterations": 2, "n_aux_epochs": 2, "aux_batch_size": 6, "aux_learning_rate": 0.005}
        given |= _some(draw, PHASES, 0.3)
    case.arguments = given


def _draw_policy_arguments(draw: random.Random, case: Case, kind: str) -> None:
    given: dict[str, Any] = {"net_arch": [8], **_some(draw, POLICY_ARGUMENTS, 0.3)}
    if not case.actions.startswith("box"):
        given.pop("log_std_init", None)
    if case.observations == "small_image":
        given["features_extractor_class"], options = draw.choice(SMALL_NETWORKS)
        given["features_extractor_kwargs"] = {"features_dim": 6, **options}
    elif case.policy.startswith("Cnn"):
        given["features_extractor_kwargs"] = {"features_dim": 6}
    elif case.policy.startswith("MultiInput"):
        given["features_extractor_kwargs"] = {"cnn_output_dim": 6}
    if issubclass(case.cls, AuxiliaryPhaseMixin):
        given["optimizer_kwargs"] = draw.choice(PHASIC_OPTIMIZERS)
    if case.cls in RECURRENT:
        given |= {"lstm_hidden_size": 4, **draw.choice(LSTMS)}
    elif issubclass(case.cls, AuxiliaryPhaseMixin):
        given["critic_arch"] = draw.choice(("dual", "shared", "detach"))
        if draw.random() < 0.4:
            given["trunk_arch"] = [5]
        if case.actions.startswith("box") and draw.random() < 0.4:
            given["std_activation"] = "softplus"
    elif draw.random() < 0.2:
        given["share_features_extractor"] = False
    if kind == "extractor":
        given["features_extractor_class"] = draw.choice((MixingExtractor, OwnExtractor, NoisyExtractor))
        case.arguments["batch_size"] = 8  # BatchNorm refuses a minibatch of one
        case.arguments["n_steps"] = 16
    if kind == "optimizer":
        given["optimizer_class"], given["optimizer_kwargs"] = draw.choice(OPTIMIZERS)
    if kind == "sde":
        case.arguments |= {"use_sde": True, "sde_sample_freq": draw.choice((-1, 4))}
        if draw.random() < 0.3:
            given |= {"squash_output": True, "use_expln": True, "full_std": False}
    case.policy_arguments = given


# ---------------------------------------------------------------------- training


class Changes(BaseCallback):
    """
    Customises a model while it collects.

    :param change: the customisation
    """

    def __init__(self, change: Customization) -> None:
        super().__init__()
        self.change = change
        self.n_rollouts = 0

    def _on_rollout_start(self) -> None:
        self.n_rollouts += 1
        if self.change.moment == "rollout start" and self.n_rollouts == 2:
            self.change.apply(self.model)

    def _on_rollout_end(self) -> None:
        if self.change.moment == "rollout end" and self.n_rollouts == 2:
            self.change.apply(self.model)

    def _on_step(self) -> bool:
        if self.change.moment == "step" and self.n_rollouts == 2 and self.model.rollout_buffer.pos == 7:
            self.change.apply(self.model)
        return True


class Result(NamedTuple):
    """
    What a training leaves behind.

    :param engine: name of the engine of its last iteration
    :param explanation: why it was that one
    :param tensors: by name, parameters, their gradients, running statistics, averages
    :param states: by optimiser, its state dictionary
    :param rows: what each iteration logged
    :param random_state: of torch and numpy
    """

    engine: str
    explanation: str
    tensors: dict[str, th.Tensor]
    states: dict[str, dict[str, Any]]
    rows: list[dict[str, float]]
    random_state: Any


def train(case: Case, engine: str, torch_compile: bool = False) -> Result:
    """
    :param case: the training
    :param engine: parameter of the model
    :param torch_compile: parameter of the model
    :return: what it leaves behind
    """
    with small_limits(), double_precision() if case.is_double else contextlib.nullcontext():
        model, change = case.make(engine, torch_compile), case.change
        if change.moment == "start":
            change.apply(model)
        rows = record_log(model)
        n_iterations = case.arguments.get("staleness", 0) + 3
        size = case.n_envs * case.arguments["n_steps"]
        if change.moment == "between":
            model.learn(size * (n_iterations - 1))
            change.apply(model)
            model.learn(size * 2, reset_num_timesteps=False)
        else:
            model.learn(size * n_iterations, Changes(change))
        return _result(model, [row for _, row in rows] + [dict(model.logger.name_to_value)])


def _result(model: Any, rows: list[dict[str, Any]]) -> Result:
    tensors = dict(model.policy.state_dict())
    if not model.current_engine.startswith("compiled"):  # graphs have no gradients
        gradients = {f"gradient of {name}": each.grad for name, each in model.policy.named_parameters()}
        tensors |= {name: gradient for name, gradient in gradients.items() if gradient is not None}
    if model.policy_ewma is not None:
        tensors |= {f"average of {name}": each for name, each in model.policy_ewma.state_dict().items()}
    optimizers = {"optimizer": model.policy.optimizer}
    for name in ("value_optimizer", "aux_optimizer"):
        if getattr(model, name, None) is not None:
            optimizers[name] = getattr(model, name)
    return Result(
        model.current_engine,
        model.explain_engine(),
        tensors,
        {name: optimizer.state_dict() for name, optimizer in optimizers.items()},
        [
            {key: value for key, value in row.items() if key.startswith(("train/", "aux/"))}
            for row in rows
            if "train/loss" in row
        ],
        (th.get_rng_state(), np.random.get_state()),
    )


@contextlib.contextmanager
def small_limits() -> Iterator[None]:
    """Within this context, cases this small reach what large ones do: several parts, blocks and groups of steps."""
    with (
        patch.object(microbatches.MicrobatchEngine, "_measured_size", lambda *_: 3),
        patch.object(rollouts, "_BLOCK", 40),
        patch.object(dense, "_MOST_WAITING", 30),
        patch.object(fused, "_CLEARED_EVERY", 5),
    ):
        yield


@contextlib.contextmanager
def double_precision() -> Iterator[None]:
    """
    Within this context, everything is computed in double precision. SB3 casts observations and what its buffers store
    to single precision.
    """
    own_preprocessing = standard.preprocessing
    names = ("rewards", "returns", "values", "log_probs", "advantages")
    to_torch, tensor = RolloutBuffer.to_torch, rollouts.DeviceMinibatches._tensor

    def as_double(function: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> th.Tensor:
            result: th.Tensor = function(*args, **kwargs)
            return result.double() if result.is_floating_point() else result

        return wrapped

    def double(obs: Any) -> Any:
        return {key: part.double() for key, part in obs.items()} if isinstance(obs, dict) else obs.double()

    def reset_double(cls: Any) -> Any:
        reset = cls.reset

        def wrapped(self: Any) -> None:
            reset(self)
            vars(self).update({name: getattr(self, name).astype(np.float64) for name in names})

        return patch.object(cls, "reset", wrapped)

    def preprocessing(*args: Any) -> Any:
        own = own_preprocessing(*args)
        return lambda obs: double(own(obs))

    dtype = th.get_default_dtype()
    th.set_default_dtype(th.float64)
    try:
        with (
            reset_double(RolloutBuffer),
            reset_double(DictRolloutBuffer),
            patch.object(RolloutBuffer, "to_torch", as_double(to_torch)),
            patch.object(rollouts.DeviceMinibatches, "_tensor", as_double(tensor)),
            patch("stable_baselines3.common.policies.preprocess_obs", lambda *a, **k: double(preprocess_obs(*a, **k))),
            patch.object(standard, "preprocessing", preprocessing),
        ):
            # Patches that the engines shall not decline for
            known = recognition._ORIGINALS
            with patch.dict(known, {key: getattr(*key) for key in known if key[1] == "to_torch"}):
                yield
    finally:
        th.set_default_dtype(dtype)
