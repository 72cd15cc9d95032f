"""
Nonsense for every argument of every algorithm: given to the constructor, given to ``load()``, or set by hand before
``learn()``. Each must be refused with an error that names the argument, and every valid value must be taken.

What is valid is written out in :data:`PARAMETERS`, independently of the package's own rules.
"""

import contextlib
import inspect
import io
import math
import os
import random
import warnings
from collections.abc import Callable, Mapping
from decimal import Decimal
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer, RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

import sb3_ppo_ewma
from benchmarks.faults.outcome import Outcome

CLASSES = [
    f"{family}{algorithm}"
    for family in ("", "Recurrent", "Maskable", "MaskableRecurrent")
    for algorithm in ("PPOEWMA", "PPG", "PPGEWMA")
]
N_STEPS = 4
SMALL: dict[str, Any] = {"n_steps": N_STEPS, "batch_size": 4, "n_epochs": 1, "device": "cpu"}
SMALL_PHASE: dict[str, Any] = {"n_policy_iterations": 1, "n_aux_epochs": 1, "aux_batch_size": 4}


class Task(gym.Env[np.ndarray, Any]):
    """Two states, two actions, all of them valid."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return np.zeros(2, np.float32), float(action), False, False, {}

    def action_masks(self) -> np.ndarray:
        """:return: of both actions"""
        return np.ones(2, bool)


# === Values ===


class Value(NamedTuple):
    """
    :param label: the value in words
    :param make: makes it
    :param number: the number that it is, ``None`` if it is none
    :param is_integer: whether it is of a type of integers
    """

    label: str
    make: Callable[[], Any]
    number: float | None = None
    is_integer: bool = False


_INTEGERS = [-(10**30), -7, -1, 0, 1, 2, 3, 8, 64, 10**30]
_NUMBERS = [-math.inf, -1e300, -1.5, -1e-9, 0.0, 1e-9, 0.25, 0.5, 1.0, 1.5, 2.0, 1e300, math.inf, math.nan]
_OTHERS: dict[str, Any] = {
    "None": None,
    "True": True,
    "False": False,
    "np.True_": np.True_,
    "complex": 0.5j,
    "Decimal": Decimal("0.5"),
    "bytes": b"1",
    "[]": [],
    "[0.5]": [0.5],
    "(2,)": (2,),
    "{}": {},
    "dict": {"a": 1},
    "set": {1},
    "range": range(3),
    "array of two": np.array([0.5, 0.5]),
    "array of one": np.array([0.5]),
    "tensor of two": th.tensor([0.5, 0.5]),
    "np.array(True)": np.array(True),
    "object": object(),
    "class": int,
    "float class": float,
    "function of nothing": lambda: 1,
    "print": print,
    "schedule": lambda progress: 0.5 * progress,
    "schedule of NaN": lambda progress: math.nan,
    "schedule of Inf": lambda progress: math.inf,
    "schedule below 0": lambda progress: -1.0,
    "schedule of text": lambda progress: "much",
    "schedule of None": lambda progress: None,
    "RolloutBuffer": RolloutBuffer,
    "ReplayBuffer": ReplayBuffer,
    "path": Path("logs"),
    "torch.device": th.device("cpu"),
}
_TEXTS = ["", "0.5", "2", "None", "true", "nonsense", "auto", "Auto", "cpu", "gpu", "cuda:x"]
_TEXTS += ["sample", "analytic", "decoupled", "behavior", "proximal", "reference", "fixed", "newest", "together"]
_TEXTS += ["as_ready", "default"]


def _constant(value: Any) -> Callable[[], Any]:
    return lambda: value


POOL: list[Value] = [
    *(Value(str(each), _constant(each), each, True) for each in _INTEGERS),
    *(Value(str(each), _constant(each), each) for each in _NUMBERS),
    *(Value(f"np.int64({each})", _constant(np.int64(each)), each, True) for each in (-1, 0, 2)),
    *(Value(f"np.float32({each})", _constant(np.float32(each)), each) for each in (-1.0, 0.5, 2.0, math.nan)),
    *(Value(f"np.float64({each})", _constant(np.float64(each)), each) for each in (0.5, math.inf)),
    *(Value(f"np.array({each})", _constant(np.array(each)), each, isinstance(each, int)) for each in (0.5, 2, -1)),
    *(Value(f"tensor({each})", _constant(th.tensor(each)), each, isinstance(each, int)) for each in (0.5, 2, -1)),
    Value("Fraction", _constant(Fraction(1, 2)), 0.5),
    *(Value(label, _constant(value)) for label, value in _OTHERS.items()),
    *(Value(repr(text), _constant(text)) for text in _TEXTS),
]
_FLAGS = {"True", "False", "np.True_", "np.array(True)"}


class Parameter(NamedTuple):
    """
    :param numbers: which numbers are valid
    :param needs_integer: whether only integers are
    :param labels: what else is valid
    """

    numbers: Callable[[float], bool] = lambda number: False
    needs_integer: bool = False
    labels: frozenset[str] = frozenset()

    def takes(self, value: Value) -> bool:
        """
        :param value: a value
        :return: whether it is valid
        """
        if value.number is None:
            return value.label in self.labels
        return self.numbers(value.number) and (value.is_integer or not self.needs_integer)


def _numbers(low: float, high: float, *labels: str, below: bool = False) -> Parameter:
    """
    :param low: smallest number
    :param high: largest number
    :param labels: other values
    :param below: whether ``high`` itself is left out
    :return: the parameter
    """
    return Parameter(lambda each: low <= each <= high and not (below and each == high), labels=frozenset(labels))


def _integers(low: float, *labels: str, high: float = 2**63 - 1) -> Parameter:
    return Parameter(lambda each: low <= each <= high, needs_integer=True, labels=frozenset(labels))


def _only(*labels: str) -> Parameter:
    return Parameter(labels=frozenset(labels))


_LARGE = 1.7e308
PARAMETERS: dict[str, Parameter] = {
    "learning_rate": _numbers(0, 1e30, "schedule"),
    "n_steps": _integers(1, high=2**40),
    "batch_size": _integers(1),
    "n_epochs": _integers(1),
    "gamma": _numbers(0, 1),
    "gae_lambda": _numbers(0, 1),
    "clip_range": _numbers(-_LARGE, 1, "None", "schedule", below=True),
    "clip_range_vf": Parameter(lambda each: 0 < each <= 1e30, labels=frozenset({"None", "schedule"})),
    "normalize_advantage": _only(*_FLAGS),
    "ent_coef": _numbers(-_LARGE, _LARGE),
    "vf_coef": _numbers(0, _LARGE),
    "max_grad_norm": _numbers(0, math.inf),
    "use_sde": _only("False"),  # the actions are discrete
    "sde_sample_freq": _integers(-1),
    "rollout_buffer_class": _only("None", "RolloutBuffer"),
    "rollout_buffer_kwargs": _only("None", "{}"),
    "target_kl": _numbers(0, _LARGE, "None"),
    "stats_window_size": _integers(1),
    "tensorboard_log": _only("None", "path", *map(repr, _TEXTS)),
    "policy_kwargs": _only("None", "{}"),
    "verbose": _integers(0, "True", "False", "np.True_", "np.array(True)"),
    "seed": _integers(0, "None", high=2**32 - 1),
    "device": _only("'cpu'", "'auto'", "torch.device"),
    "prox_decay": _numbers(0, 1, "None", "'auto'", below=True),
    "kl_coef": _numbers(0, _LARGE),
    "kl_estimator": _only("'sample'", "'analytic'"),
    "max_importance_ratio": _numbers(1, _LARGE, "None"),
    "advantage_decay": _numbers(0, 1, "None", below=True),
    "n_epochs_value": _integers(1, "None"),
    "recompute_advantages": _only(*_FLAGS),
    "staleness": _integers(0),
    "staleness_mode": _only("'decoupled'", "'behavior'", "'proximal'"),
    "engine": _only("'auto'", "'reference'"),
    "tuned_for_n_envs": _integers(1, "None"),
    "torch_compile": _only("'default'", *_FLAGS),
    "data_parallel": _only("None", "False"),
    "max_policy_lag": _integers(0, "None"),
    "lag_mode": _only("'fixed'", "'newest'"),
    "collector_timeout": Parameter(lambda each: 0 < each < math.inf),
    "collect": _only("'together'", "'as_ready'"),
    "n_policy_iterations": _integers(1),
    "n_aux_epochs": _integers(0),
    "aux_batch_size": _integers(1, "None"),
    "aux_learning_rate": _numbers(0, 1e30, "schedule"),
    "beta_clone": _numbers(0, _LARGE),
    "vf_true_coef": _numbers(0, _LARGE),
    "vf_aux_coef": _numbers(0, _LARGE),
}
# Valid by themselves, and contradicted by what the other arguments are here
CONTRADICTED = {("batch_size", 1), ("normalize_advantage", None)}
# Shares of the trials with a misspelt name, and with something that breaks in training
_MISSPELT, _BREAKS = 0.03, 0.03
# Valid values that start processes or a compiler or write files, which have tests of their own
NOT_TRAINED = {"max_policy_lag", "collect", "torch_compile", "tuned_for_n_envs", "tensorboard_log"}


def parameters_of(cls: type) -> dict[str, Parameter]:
    """
    :param cls: class of an algorithm
    :return: its parameters
    """
    names = inspect.signature(cls).parameters
    own = {name: each for name, each in PARAMETERS.items() if name in names}
    if "Recurrent" in cls.__name__ or "Maskable" in cls.__name__:
        own["batch_size"] = _integers(1, "None")
    if "Maskable" in cls.__name__ and "rollout_buffer_class" in own:
        own["rollout_buffer_class"] = _only("None")
    return own


# === Models ===


@cache
def environment() -> VecEnv:
    """:return: the environments of all models"""
    return DummyVecEnv([Task, Task])


def make(cls: Any, **kwargs: Any) -> Any:
    """
    :param cls: class of an algorithm
    :param kwargs: arguments that replace the small ones
    :return: a small model
    """
    recurrent = "Recurrent" in cls.__name__
    network: dict[str, Any] = {"net_arch": [2], **({"lstm_hidden_size": 2} if recurrent else {})}
    phase = SMALL_PHASE if "PPG" in cls.__name__ else {}
    policy = "MlpLstmPolicy" if recurrent else "MlpPolicy"
    return cls(policy, environment(), **{**SMALL, **phase, "policy_kwargs": network, **kwargs})


@cache
def saved(cls: Any) -> bytes:
    """
    :param cls: class of an algorithm
    :return: file of a small model
    """
    file = io.BytesIO()
    make(cls).save(file)
    return file.getvalue()


# Models that have not learned yet
MODELS: dict[Any, Any] = {}


def construct(cls: Any, given: Mapping[str, Any]) -> Any:
    """
    :param cls: class of an algorithm
    :param given: arguments
    :return: the model
    """
    return make(cls, **given)


def load(cls: Any, given: Mapping[str, Any]) -> Any:
    """
    :param cls: class of an algorithm
    :param given: keyword arguments of ``load()``
    :return: the model
    """
    device = {"device": given["device"]} if "device" in given else {"device": "cpu"}
    others = {name: value for name, value in given.items() if name != "device"}
    return cls.load(io.BytesIO(saved(cls)), environment(), **device, **others)


def set_by_hand(cls: Any, given: Mapping[str, Any]) -> Any:
    """
    :param cls: class of an algorithm
    :param given: attributes
    :return: the model, with these attributes
    """
    model = MODELS.pop(cls, None) or make(cls)
    attributes = {"_stats_window_size" if name == "stats_window_size" else name: given[name] for name in given}
    before = {name: getattr(model, name) for name in attributes}
    vars(model).update(attributes)
    try:
        return model.learn(2 * N_STEPS)
    except (TypeError, ValueError):
        if model.num_timesteps == 0:  # refused before anything happened
            vars(model).update(before)
            MODELS[cls] = model
        raise


WAYS: dict[str, Callable[[Any, Mapping[str, Any]], Any]] = {
    "constructor": construct,
    "load()": load,
    "set by hand": set_by_hand,
}


# === Trials ===


def names_cause(error: BaseException, name: str) -> bool:
    """
    :param error: an error
    :param name: name of an argument
    :return: whether its message names it in one line, and its type is one that a user may expect
    """
    message = str(error)
    is_named = name in message or name.replace("_", " ") in message
    return isinstance(error, TypeError | ValueError) and is_named and "\n" not in message and len(message) < 800


def attempt(way: str, cls: Any, name: str, value: Value, is_valid: bool) -> Outcome:
    """
    :param way: how the value reaches the model
    :param cls: class of an algorithm
    :param name: name of an argument
    :param value: its value
    :param is_valid: whether the argument may have this value
    :return: what becomes of it
    """
    case = f"{cls.__name__}: {name}={value.label}"
    kind = f"{way}: {'a valid value' if is_valid else 'nonsense'}"
    try:
        model = WAYS[way](cls, {name: value.make()})
        if is_valid and name not in NOT_TRAINED and abs(value.number or 0) < 100:
            model.learn(2 * N_STEPS)
    except Exception as error:
        named = names_cause(error, name)
        if is_valid and abs(value.number or 0) >= 100 and "NaN or Inf in" in str(error):
            return Outcome(kind, "refused", f"{case}: {error}")  # it overflows when it is used
        # Contradictions, and what a model cannot change once it is built, are refused by name, too
        may_be_refused = (
            way == "set by hand"
            or name == "tuned_for_n_envs"
            or (way, name) == ("load()", "policy_kwargs")  # which must be those in the file
            or (name, value.number) in CONTRADICTED
            or abs(value.number or 0) >= 100
        )
        if is_valid and not (named and may_be_refused):
            return Outcome(kind, "silent", f"{case}: refused: {type(error).__name__}: {error}")
        return Outcome(kind, "refused" if named else "unclear", f"{case}: {type(error).__name__}: {error}")
    return Outcome(kind, "recovered" if is_valid else "silent", f"{case}: taken")


def misspelt(rng: random.Random, way: str, cls: Any, name: str) -> Outcome:
    """
    :param rng: random numbers
    :param way: constructor or load
    :param cls: class of an algorithm
    :param name: name of an argument
    :return: what becomes of it with two letters exchanged
    """
    kind = f"{way}: a name misspelt"
    i = rng.randrange(len(name) - 1)
    wrong = name[:i] + name[i + 1] + name[i] + name[i + 2 :]
    wrong = wrong if wrong != name else f"{name}s"
    try:
        WAYS[way](cls, {wrong: 0.5})
    except Exception as error:
        named = isinstance(error, TypeError) and names_cause(error, wrong) and f"Did you mean {name!r}?" in str(error)
        return Outcome(kind, "refused" if named else "unclear", f"{wrong}: {type(error).__name__}: {error}")
    return Outcome(kind, "silent", f"{cls.__name__}: {wrong}=0.5 taken")


class Breaks(BaseCallback):
    """
    Breaks something at the end of a rollout.

    :param what: a key of :data:`BREAKS`
    :param value: what it becomes
    """

    def __init__(self, what: str, value: float) -> None:
        super().__init__()
        self.what, self.value = what, value

    def _on_step(self) -> bool:
        return True

    @th.no_grad()
    def _on_rollout_end(self) -> None:
        model: Any = self.model
        number = max(-_LARGEST_SINGLE, min(_LARGEST_SINGLE, self.value)) if math.isfinite(self.value) else self.value
        if self.what == "learning rate":
            model.lr_schedule = lambda _: self.value
        elif self.what == "parameter":
            next(model.policy.parameters()).flatten()[0] = number
        elif self.what == "average" and model.policy_ewma is not None:
            model.policy_ewma.averages[-1].fill_(number)
        elif self.what in ("exp_avg", "exp_avg_sq"):
            for state in model.policy.optimizer.state.values():
                state[self.what].fill_(number)


_LARGEST_SINGLE = float(np.finfo(np.float32).max)
BREAKS = ("learning rate", "parameter", "average", "exp_avg", "exp_avg_sq")


def broken(rng: random.Random, cls: Any) -> Outcome:
    """
    :param rng: random numbers
    :param cls: class of an algorithm
    :return: what becomes of a model in which something breaks between rollout and training: if an error says that the
        parameters are finite, they must be, and if no error is raised, too
    """
    what, value = rng.choice(BREAKS), rng.choice([math.nan, math.inf, -math.inf, 1e20, 1e29, 1e38, 1e300])
    kwargs = {"engine": rng.choice(["auto", "reference"]), "prox_decay": rng.choice(["auto", None])}
    model = make(cls, **kwargs, batch_size=rng.choice([2, 8])).learn(2 * N_STEPS)
    case = f"{cls.__name__}, {kwargs}: {what} = {value}"
    message = ""
    try:
        model.learn(2 * N_STEPS, Breaks(what, value))
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        if not isinstance(error, ValueError):
            return Outcome("training: something breaks", "unclear", f"{case}: {message}")
    is_finite = all(bool(th.isfinite(parameter).all()) for parameter in model.policy.parameters())
    if not message:
        return Outcome("training: something breaks", "recovered" if is_finite else "silent", case)
    is_true = is_finite or ("the parameters are finite" not in message and "load parameters" in message)
    is_named = "NaN or Inf in" in message or "the schedule of learning_rate gives" in message
    verdict = "unclear" if not is_named else "refused" if is_true else "silent"
    return Outcome("training: something breaks", verdict, f"{case}: {message}")


def run(n_trials: int, seed: int, folder: Path) -> list[Outcome]:
    """
    :param n_trials: number of values to give
    :param seed: seed of the choice
    :param folder: for logs, to which relative paths lead
    :return: what became of each
    """
    rng = random.Random(seed)
    before = Path.cwd()
    os.chdir(folder)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            return [_trial(rng) for _ in range(n_trials)]
    finally:
        os.chdir(before)


def _trial(rng: random.Random) -> Outcome:
    cls = getattr(sb3_ppo_ewma, rng.choice(CLASSES))
    way = rng.choice(list(WAYS))
    parameters = parameters_of(cls)
    name = rng.choice(list(parameters))
    kind = rng.random()
    if kind < _BREAKS:
        return broken(rng, cls)
    if kind < _BREAKS + _MISSPELT:
        return misspelt(rng, rng.choice(["constructor", "load()"]), cls, name)
    value = rng.choice(POOL)
    is_whole_rollout = name == "batch_size" and value.label == "None" and way != "constructor"  # as in SB3
    is_valid = parameters[name].takes(value) or is_whole_rollout
    if is_valid and name in NOT_TRAINED and way == "set by hand":
        way = "constructor"
    return attempt(way, cls, name, value, is_valid)
