"""
What each argument of the algorithms may be, SB3's too. The same rules hold when a model is built or loaded and whenever
it begins to learn or to train, because attributes may have been set by hand.
"""

import contextlib
import inspect
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import cache, partial
from typing import Any, get_args

import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, NatureCNN
from stable_baselines3.common.utils import FloatSchedule, get_device

from sb3_ppo_ewma._arguments import (
    LARGEST_INTEGER,
    PACKAGES,
    CompileMode,
    EngineChoice,
    KlEstimator,
    LagMode,
    SB3ArgumentError,
    StalenessMode,
    check_choice,
    check_flag,
    check_integer,
    check_learning_rate,
    check_number,
    check_schedule,
    checked_clip_range,
    checked_clip_range_vf,
    did_you_mean,
    merged_signature,
    plain,
    shown,
    warn_caller,
)
from sb3_ppo_ewma._parallel.process_group import check_data_parallel
from sb3_ppo_ewma.checkpointing.conversion import CLIP_OFF_IN_FILE

# From the name of an argument and its value to the value in the form that is used
Rule = Callable[[str, Any], Any]

# In steps; NumPy's limits are not far above
_LONGEST_ROLLOUT = 2**40
_OBSERVATIONS = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
# Arguments of a rollout buffer that the algorithm gives
_GIVEN_TO_BUFFERS = {
    "buffer_size",
    "observation_space",
    "action_space",
    "hidden_state_shape",
    "device",
    "gae_lambda",
    "gamma",
    "n_envs",
}
_GIVEN_TO_POLICIES = {"observation_space", "action_space", "lr_schedule"}
# What a model was built for, which attributes set by hand do not change
_BUILT_FOR = ("n_steps", "n_envs", "use_sde", "device", "policy_class", "policy_kwargs", "rollout_buffer_class",
              "rollout_buffer_kwargs")  # fmt: skip
# What is read when a model is built only, as in SB3, with what takes effect instead
_READ_ONCE = {
    "learning_rate": "lr_schedule, or call _setup_lr_schedule()",
    "gamma": "rollout_buffer.gamma as well",
    "gae_lambda": "rollout_buffer.gae_lambda as well",
    "seed": "it with set_random_seed()",
}


class SpaceError(ValueError, NotImplementedError, AssertionError):
    """A ``ValueError`` that is also what SB3 raises for spaces that it does not support."""


# === One argument ===


def _or_none(rule: Rule) -> Rule:
    """
    :param rule: of an argument that may also be ``None``
    :return: the rule with it
    """

    def check(name: str, value: Any) -> Any:
        if value is None:
            return None
        try:
            return rule(name, value)
        except (TypeError, ValueError) as error:
            raise error if "None" in str(error) else type(error)(f"{error}; it may also be None") from None

    return check


def _number(low: float, high: float = math.inf, closed: bool = False) -> Rule:
    return partial(check_number, low=low, high=high, closed=closed)


def _integer(minimum: int, maximum: int = LARGEST_INTEGER) -> Rule:
    return partial(check_integer, minimum=minimum, maximum=maximum)


def _choice(choices: Any) -> Rule:
    return partial(check_choice, choices=get_args(choices))


def _coefficient(low: float) -> Rule:
    def check(name: str, value: Any) -> Any:
        number = check_number(name, value, low)
        return value if isinstance(value, th.Tensor) else number  # which may have a gradient

    return check


def _prox_decay(name: str, value: Any) -> Any:
    if isinstance(value, str):
        return check_choice(name, value, ("auto",), "a number in [0, 1) or None")
    return None if value is None else check_number(name, value, 0, 1)


def _torch_compile(name: str, value: Any) -> bool | str:
    if isinstance(plain(value), bool):
        return check_flag(name, value)
    return check_choice(name, value, get_args(CompileMode), "True or False")


def _timeout(name: str, value: Any) -> float:
    seconds = check_number(name, value, 0)
    if seconds == 0:
        raise ValueError(f"{name} must be > 0, got 0")
    return seconds


def _data_parallel(name: str, value: Any) -> Any:
    check_data_parallel(value)
    return value


def _clip_range(name: str, value: Any) -> Any:
    is_known = isinstance(value, FloatSchedule) or (isinstance(value, str) and value == CLIP_OFF_IN_FILE)
    return value if is_known else checked_clip_range(name, value)


def _clip_range_vf(name: str, value: Any) -> Any:
    return value if isinstance(value, FloatSchedule) else checked_clip_range_vf(name, value)


def _verbose(name: str, value: Any) -> int:
    level = plain(value)
    return check_integer(name, int(level) if isinstance(level, bool) else level, 0)


def _keywords(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise TypeError(f"{name} must be a dictionary or None, got {shown(value)}")
    return value


def _keywords_if_any(name: str, value: Any) -> dict[str, Any]:
    return {} if value is None else _keywords(name, value)


def _path(name: str, value: Any) -> Any:
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name} must be a path or None, got {shown(value)}")
    return value


def _device(name: str, value: Any) -> Any:
    allowed = "'auto', the name of a device of torch such as 'cpu' or 'cuda:0', or a torch.device"
    if isinstance(value, bool) or not isinstance(value, str | int | th.device):
        raise TypeError(f"{name} must be {allowed}, got {shown(value)}")
    try:
        th.device("cpu" if value == "auto" else value)
    except (RuntimeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} must be {allowed}, got {shown(value)}") from error
    return value


def _buffer_class(name: str, value: Any) -> Any:
    if not (isinstance(value, type) and issubclass(value, RolloutBuffer)):
        raise TypeError(f"{name} must be a class derived from RolloutBuffer or None, got {shown(value)}")
    return value


RULES: dict[str, Rule] = {
    # SB3's
    "learning_rate": check_learning_rate,
    "n_steps": _integer(1, _LONGEST_ROLLOUT),
    "batch_size": _or_none(_integer(1)),
    "n_epochs": _integer(1),
    "gamma": _number(0, 1, closed=True),
    "gae_lambda": _number(0, 1, closed=True),
    "clip_range": _clip_range,
    "clip_range_vf": _clip_range_vf,
    "normalize_advantage": check_flag,
    "ent_coef": _coefficient(-math.inf),
    "vf_coef": _coefficient(0),
    "max_grad_norm": _number(0, closed=True),
    "use_sde": check_flag,
    "sde_sample_freq": _integer(-1),
    "rollout_buffer_class": _or_none(_buffer_class),
    "rollout_buffer_kwargs": _keywords_if_any,
    "target_kl": _or_none(_number(0)),
    "stats_window_size": _integer(1),
    "tensorboard_log": _or_none(_path),
    "policy_kwargs": _keywords_if_any,
    "verbose": _verbose,
    "seed": _or_none(_integer(0, 2**32 - 1)),
    "device": _device,
    "_init_setup_model": check_flag,
    # EwmaMixin's
    "prox_decay": _prox_decay,
    "kl_coef": _number(0),
    "kl_estimator": _choice(KlEstimator),
    "max_importance_ratio": _or_none(_number(1)),
    "advantage_decay": _or_none(_number(0, 1)),
    "n_epochs_value": _or_none(_integer(1)),
    "recompute_advantages": check_flag,
    "staleness": _integer(0),
    "staleness_mode": _choice(StalenessMode),
    "engine": _choice(EngineChoice),
    "tuned_for_n_envs": _or_none(_integer(1)),
    "torch_compile": _torch_compile,
    "data_parallel": _data_parallel,
    "max_policy_lag": _or_none(_integer(0)),
    "lag_mode": _choice(LagMode),
    "collector_timeout": _timeout,
    "collect": partial(check_choice, choices=("together", "as_ready")),
    # AuxiliaryPhaseMixin's
    "n_policy_iterations": _integer(1),
    "n_aux_epochs": _integer(0),
    "aux_batch_size": _or_none(_integer(1)),
    "aux_learning_rate": check_learning_rate,
    "beta_clone": _number(0),
    "vf_true_coef": _number(0),
    "vf_aux_coef": _number(0),
}
# Attributes of a model by the names of their arguments, where they differ
_ATTRIBUTES = {"stats_window_size": "_stats_window_size"}


# === All arguments ===


def checked_arguments(model: Any, given: Iterable[str], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """
    Check the arguments of a constructor before anything is built.

    :param model: algorithm under construction, which has its own parameters as attributes
    :param given: names of the arguments that were given
    :param arguments: arguments of the algorithm it extends by name, with defaults
    :return: these arguments, in the form that is used; the attributes are brought into it as well
    :raises TypeError: if an argument has the wrong type
    :raises ValueError: if an argument is out of range, or contradicts another one
    """
    attributes = vars(model)
    checked = {name: RULES[name](name, value) if name in RULES else value for name, value in arguments.items()}
    attributes.update({name: RULES[name](name, value) for name, value in attributes.items() if name in RULES})
    if not checked["normalize_advantage"] and model.advantage_decay == model._default_advantage_decay:
        model.advantage_decay = None  # SB3's switch overrides a default of ours
    _check_together({**checked, **attributes}, is_stale=model._is_stale)
    # A constructor in between may supply the policy or the environment.
    if "env" in given:
        env = arguments["env"]
        _check_env(env, may_be_none=not arguments["_init_setup_model"])
        _check_sde(checked.get("use_sde"), getattr(env, "action_space", None))
        if not checked.get("rollout_buffer_class"):
            _check_observation_space(getattr(env, "observation_space", None))  # SB3's wrappers fail at others
    if "policy" in given:
        policy_class = checked_policy(type(model), arguments["policy"])
        _check_policy_kwargs(type(model), policy_class, checked["policy_kwargs"] or {})
    _check_batch_size(type(model), checked)
    if checked.get("rollout_buffer_kwargs"):
        _check_buffer_kwargs(checked["rollout_buffer_class"], checked["rollout_buffer_kwargs"])
    return checked


def check_model(model: Any, names: Collection[str] | None = None) -> None:
    """
    Check the attributes of a model, and bring them into the form that is used.

    :param model: an algorithm of this package
    :param names: names of the arguments to check, ``None``: all
    :raises TypeError: if one has the wrong type
    :raises ValueError: if one is out of range, or contradicts another one
    """
    attributes = vars(model)
    for name in RULES if names is None else names:
        attribute = _ATTRIBUTES.get(name, name)
        if name in RULES and attribute in attributes:
            attributes[attribute] = RULES[name](name, attributes[attribute])
    if names is None or names:
        _check_together(attributes, is_stale=model._is_stale)


@contextlib.contextmanager
def building(model: Any) -> Iterator[None]:
    """
    Context in which a model is built, by the constructor or by ``load()``. Its arguments are checked first. Without an
    environment, values in a file are not: such a model predicts.

    :param model: an algorithm of this package
    :raises TypeError: if an argument has the wrong type
    :raises ValueError: if an argument is out of range, or something does not fit together
    """
    _check_to_build(model)
    try:
        yield
        for group in model.policy.optimizer.param_groups:
            check_learning_rate("learning_rate at the start", group["lr"])
    except MemoryError as error:
        sizes = f"n_steps={model.n_steps} and n_envs={model.n_envs}"
        raise MemoryError(f"the rollout buffer for {sizes} does not fit into memory: {error}") from error
    except Exception:
        if callable(model.learning_rate):  # a schedule that counts may be asked again: there is no model
            check_schedule("learning_rate", model.learning_rate)
        raise
    model._built_for = {name: getattr(model, name, None) for name in (*_BUILT_FOR, *_READ_ONCE, "lr_schedule")}


def _check_to_build(model: Any) -> None:
    given = model._given_to_load
    is_default = _is_same(model.advantage_decay, model._default_advantage_decay) and "advantage_decay" not in given
    if is_default and _is_same(model.normalize_advantage, False):
        model.advantage_decay = None  # SB3's switch overrides a default of ours, as in the constructor
    if "stats_window_size" in given:
        model._stats_window_size = vars(model).pop("stats_window_size")
    names = given if model.env is None else None
    if names is None and model._states_in_file is not None:  # load() needs no other processes
        names = [name for name in RULES if name != "data_parallel" or name in given]
    check_model(model, names)
    if model.env is not None and model.n_envs != model.env.num_envs:
        raise ValueError(f"n_envs must be that of env, {model.env.num_envs}, got {shown(model.n_envs)}")
    _check_built_policy(model)


def check_built_model(model: Any) -> None:
    """
    Check a model that is about to learn or to train: its attributes may have been set by hand.

    :param model: an algorithm of this package
    :raises TypeError: if one has the wrong type
    :raises ValueError: if one is out of range, or the model was built for another value
    """
    check_model(model)
    attributes = vars(model)
    for name in ("clip_range", "clip_range_vf", "lr_schedule"):
        value = attributes[name]
        if value is not None and not callable(value):
            attributes[name] = FloatSchedule(check_number(name, value, -math.inf))
    model.device = get_device(model.device)
    fits = {**{name: _fits(model, name) for name in _BUILT_FOR}, **model._fits_built_model()}
    for name, is_fitting in fits.items():
        if not is_fitting:
            raise SB3ArgumentError(
                f"{name} was set to {shown(attributes[name])} by hand, but the model was built for another value: "
                f"save it and give {name} to load()"
            )
    if model.advantage_moments is not None:
        model.advantage_moments.decay = model.advantage_decay


def check_to_learn(model: Any) -> None:
    """
    Check a model that is about to learn. Warn of attributes that were set by hand since it was built and, as in SB3,
    have no effect or half of one.

    :param model: an algorithm of this package
    :raises TypeError: if an argument has the wrong type
    :raises ValueError: if an argument is out of range, or the model was built for another value
    """
    check_built_model(model)
    for name, instead in _READ_ONCE.items():
        built, value = model._built_for[name], getattr(model, name)
        if name == "learning_rate":
            is_done = model.lr_schedule is not model._built_for["lr_schedule"]
            if not _is_same(value, built):
                check_schedule(name, value)
        else:
            is_done = _is_same(getattr(model.rollout_buffer, name, None), value)
        if not (is_done or _is_same(value, built)):
            warn_caller(
                f"{name} was set to {shown(value)} by hand, which is not what this model trains with, as in SB3: set "
                f"{instead}"
            )


def _fits(model: Any, name: str) -> bool:
    """
    :param model: an algorithm
    :param name: name of an attribute
    :return: whether the model was built for its present value
    """
    value: Any = getattr(model, name, None)
    if name == "n_envs":
        return model.env is None or value == model.env.num_envs
    if name == "device":  # somebody may have moved the policy, too
        own: th.device = model.policy.device
        return value.type == own.type and (value.index == own.index or None in (value.index, own.index))
    if name == "n_steps" and getattr(model.rollout_buffer, "buffer_size", None) == value:
        return True  # somebody gave the model another buffer, too
    return _is_same(value, model._built_for[name])


def _is_same(value: Any, other: Any) -> bool:
    try:
        return value is other or bool(value == other)
    except (TypeError, ValueError, RuntimeError):  # arrays among them
        return False


def _check_together(values: Mapping[str, Any], is_stale: bool) -> None:
    """
    :param values: arguments by name
    :param is_stale: whether rollouts wait before they are trained on
    :raises ValueError: if some of them contradict each other
    """
    advantage_decay, normalizes = values["advantage_decay"], values["normalize_advantage"]
    if advantage_decay is not None and not normalizes:
        raise ValueError(
            f"advantage_decay={advantage_decay} normalises advantages and contradicts normalize_advantage=False: "
            "use advantage_decay=None"
        )
    if values["batch_size"] == 1 and normalizes and advantage_decay is None:
        raise SB3ArgumentError(
            "batch_size must be greater than 1 to normalise advantages per minibatch, got 1; "
            "advantage_decay=0.0 normalises over the rollout and allows 1"
        )
    has_no_prox = is_stale and values["staleness_mode"] == "behavior" and values["prox_decay"] is None
    if values["kl_coef"] > 0 and values["kl_estimator"] == "analytic" and has_no_prox:
        raise ValueError(
            "kl_estimator='analytic' needs the distributions of the proximal policy, but with prox_decay=None and "
            "staleness_mode='behavior' that is a past policy of which only log-probabilities are kept: "
            "use kl_estimator='sample'"
        )


def _check_env(env: Any, may_be_none: bool) -> None:
    """
    :param env: the user's argument
    :param may_be_none: whether a model can do without one
    :raises TypeError: if it is no environment
    :raises ValueError: if a model cannot be built without one
    """
    allowed = "env must be an environment of Gymnasium, a VecEnv or the id of a registered environment"
    if env is None:
        if not may_be_none:
            raise ValueError(f"{allowed}, got None; load() gives a model that only predicts")
    elif not isinstance(env, str) and (isinstance(env, type) or not hasattr(env, "reset")):
        raise TypeError(f"{allowed}, got {shown(env)}")


def _check_batch_size(cls: type, arguments: Mapping[str, Any]) -> None:
    """
    :param cls: class of the algorithm
    :param arguments: arguments of its constructor, by name
    :raises TypeError: if ``batch_size`` is ``None`` in a family that does not take it
    """
    if arguments["batch_size"] is None:
        annotation = merged_signature(cls).parameters["batch_size"].annotation
        if "None" not in str(annotation):
            raise TypeError("batch_size must be an integer >= 1, got None")


# === Policies ===


def checked_policy(cls: Any, policy: Any) -> type:
    """
    :param cls: class of the algorithm
    :param policy: the user's argument
    :return: the policy's class
    :raises TypeError: if it is neither a name nor a class
    :raises ValueError: if it is an unknown name, or a class that the algorithm cannot train
    """
    aliases: Mapping[str, type] = cls.policy_aliases
    base = next(iter(aliases.values())).__name__
    allowed = f"policy must be one of {', '.join(map(repr, aliases))} or a class derived from {base}"
    if isinstance(policy, str):
        if policy not in aliases:
            raise ValueError(f"{allowed}, got {policy!r}{did_you_mean(policy, aliases)}")
        return aliases[policy]
    if not isinstance(policy, type):
        raise TypeError(f"{allowed}, got {shown(policy)}")
    for needed, reason in cls._needed_policies().items():
        if not issubclass(policy, needed):
            raise ValueError(f"{allowed}, {reason}, got {policy}")
    if not hasattr(policy, "evaluate_actions"):
        raise ValueError(f"{allowed}, which has evaluate_actions(), got {policy}")
    if hasattr(policy, "_process_sequence") and not cls.policy_evaluation.sequence_fields:
        raise ValueError(f"{allowed}, got the recurrent {policy}, which only the algorithms Recurrent… train")
    return policy


def _check_built_policy(model: Any) -> None:
    """
    Check a model before its policy is built: policy, its arguments and the spaces must fit together.

    :param model: an algorithm of this package
    :raises TypeError: if an argument of the policy is unknown or has the wrong type
    :raises ValueError: if something does not fit
    """
    policy = checked_policy(type(model), model.policy_class)
    _check_policy_kwargs(type(model), policy, model.policy_kwargs or {})
    if not model._has_masks and "action_masks" in inspect.signature(policy.evaluate_actions).parameters:  # type: ignore[attr-defined]  # checked
        warn_caller(f"{type(model).__name__} takes no action masks, which its policy was made for")
    _check_spaces(model, policy)
    _check_buffer(model)


def _check_policy_kwargs(cls: type, policy: type, policy_kwargs: Mapping[str, Any]) -> None:
    """
    :param cls: class of the algorithm
    :param policy: class of the policy
    :param policy_kwargs: its keyword arguments
    :raises TypeError: if one is unknown or has the wrong type
    :raises ValueError: if one is out of range
    """
    known = known_keywords(policy)
    for name, value in policy_kwargs.items():
        if known is not None and (name not in known or name in _GIVEN_TO_POLICIES):
            raise TypeError(
                f"policy_kwargs must have arguments of {policy.__name__}, got {name}={shown(value)}"
                f"{did_you_mean(name, set(known) - _GIVEN_TO_POLICIES)}"
            )
        if name == "use_sde" and "use_sde" in merged_signature(cls).parameters:
            raise TypeError(f"policy_kwargs must not have use_sde, got {shown(value)}: give it to {cls.__name__}")
        if name in _POLICY_RULES and _is_ours(_defining(policy, name)):
            _POLICY_RULES[name](f"{name} in policy_kwargs", value)


def known_keywords(cls: type) -> Mapping[str, inspect.Parameter] | None:
    """
    :param cls: a class
    :return: parameters that its constructor takes, ``None`` if code of the user may take others from ``**kwargs``
    """
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = _parameters(base).values()
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return merged_signature(cls).parameters
        if not _is_ours(base):
            return None
    return None


def _defining(cls: type, name: str) -> type | None:
    """
    :param cls: a class
    :param name: name of an argument of its constructor
    :return: the class whose constructor has this argument
    """
    return next((base for base in cls.__mro__ if "__init__" in vars(base) and name in _parameters(base)), None)


@cache
def _parameters(cls: type) -> Mapping[str, inspect.Parameter]:
    """
    :param cls: a class with a constructor of its own
    :return: parameters that the constructor names
    """
    return inspect.signature(vars(cls)["__init__"]).parameters


def _is_ours(cls: type | None) -> bool:
    return cls is not None and cls.__module__.partition(".")[0] in PACKAGES


def _net_arch(name: str, value: Any) -> None:
    networks = value[0] if isinstance(value, list | tuple) and value and isinstance(value[0], dict) else value
    is_pair = isinstance(networks, dict) and set(networks) <= {"pi", "vf"}
    lists = list(networks.values()) if is_pair else [networks]
    if not all(isinstance(each, list | tuple) for each in lists):
        raise TypeError(
            f"{name} must be a list of integers >= 1, a dictionary of such lists with the keys 'pi' and 'vf', or None, "
            f"got {shown(value)}"
        )
    for units in lists:
        for number in units:
            check_integer(f"every number in {name}", number, 1)


def _class(name: str, value: Any) -> None:
    if not callable(value) or isinstance(value, th.nn.Module):
        raise TypeError(f"{name} must be a class, got {shown(value)}")


# Arguments of SB3's policies
_POLICY_RULES: dict[str, Rule] = {
    "net_arch": _or_none(_net_arch),
    "activation_fn": _class,
    "ortho_init": check_flag,
    "log_std_init": _number(-math.inf),
    "full_std": check_flag,
    "use_expln": check_flag,
    "squash_output": check_flag,
    "features_extractor_kwargs": _or_none(_keywords),
    "share_features_extractor": _or_none(check_flag),
    "normalize_images": check_flag,
    "optimizer_class": _class,
    "optimizer_kwargs": _or_none(_keywords),
    "lstm_hidden_size": _integer(1),
    "n_lstm_layers": _integer(1),
    "shared_lstm": check_flag,
    "enable_critic_lstm": check_flag,
    "lstm_kwargs": _or_none(_keywords),
}


# === Spaces and rollout buffers ===


def _check_spaces(model: Any, policy: type) -> None:
    """
    :param model: an algorithm of this package
    :param policy: class of its policy
    :raises ValueError: if policy and spaces do not fit together
    """
    space, actions = model.observation_space, model.action_space
    is_dict = isinstance(space, spaces.Dict)
    buffer_class = model.rollout_buffer_class
    if buffer_class is None or _is_ours(buffer_class):
        _check_observation_space(space)
    _check_sde(model.use_sde, actions)
    for name, each in (("observation_space", space), ("action_space", actions)):
        if isinstance(each, spaces.Discrete) and each.start != 0:
            warn_caller(f"{name} {each} does not start at 0: as in SB3, it is taken for Discrete({each.n})")
    default = merged_signature(policy).parameters.get("features_extractor_class")
    extractor = (model.policy_kwargs or {}).get("features_extractor_class", default and default.default)
    if not _is_ours(policy) or not isinstance(extractor, type):
        return
    name = next((name for name, each in model.policy_aliases.items() if each is policy), policy.__name__)
    multi_input = next((each for each in model.policy_aliases if each.startswith("MultiInput")), "MultiInputPolicy")
    if is_dict and extractor in (FlattenExtractor, NatureCNN):
        raise ValueError(f"policy must be {multi_input!r} for a Dict observation space, got {name!r}")
    if not is_dict and extractor is CombinedExtractor:
        raise ValueError(f"policy={name!r} needs a Dict observation space, got {space}")


def _check_sde(use_sde: Any, action_space: Any) -> None:
    """
    :param use_sde: the user's argument
    :param action_space: action space, ``None``: not known yet
    :raises ValueError: if the one is not for the other
    """
    if use_sde and isinstance(action_space, spaces.Space) and not isinstance(action_space, spaces.Box):
        raise ValueError(f"use_sde=True (gSDE) needs a Box action space, got {action_space}")


def _check_observation_space(space: Any) -> None:
    """
    :param space: observation space
    :raises ValueError: if SB3 does not support it
    """
    parts = space.spaces.values() if isinstance(space, spaces.Dict) else [space]  # or of gym's own classes
    if any(isinstance(part, spaces.Space) and not isinstance(part, _OBSERVATIONS) for part in parts):
        raise SpaceError(
            "observation_space must be Box, Discrete, MultiDiscrete, MultiBinary or a Dict of these, not nested, got "
            f"{space}"
        )


def _check_buffer(model: Any) -> None:
    """
    :param model: an algorithm of this package
    :raises TypeError: if the rollout buffer does not take an argument
    :raises ValueError: if the rollout buffer is not for the observation space or the family of algorithms
    """
    given = model.rollout_buffer_class
    if given is None:
        return
    if model._has_masks and not issubclass(given, tuple(model.samples_classes)):
        names = " or ".join(each.__name__ for each in model.samples_classes)
        raise ValueError(f"rollout_buffer_class must be derived from {names} or None, got {given}")
    is_dict = isinstance(model.observation_space, spaces.Dict)
    if is_dict != issubclass(given, DictRolloutBuffer) and _is_ours(given):
        raise SpaceError(
            f"rollout_buffer_class={given.__name__} must be used with "
            f"{'Box, Discrete, MultiDiscrete or MultiBinary' if is_dict else 'Dict obs space only'}, "
            f"got {model.observation_space}"
        )
    _check_buffer_kwargs(given, model.rollout_buffer_kwargs or {})


def _check_buffer_kwargs(buffer_class: type | None, kwargs: Mapping[str, Any]) -> None:
    """
    :param buffer_class: class of the rollout buffer, ``None``: SB3's
    :param kwargs: arguments for it
    :raises TypeError: if it does not take one of them
    """
    known = known_keywords(buffer_class or RolloutBuffer)
    if known is None:
        return
    own = set(known) - _GIVEN_TO_BUFFERS
    for name, value in kwargs.items():
        if name not in own:
            takes = ", ".join(sorted(own)) or "none beside those that the algorithm gives"
            raise TypeError(
                f"rollout_buffer_kwargs must have arguments of {(buffer_class or RolloutBuffer).__name__} ({takes}), "
                f"got {name}={shown(value)}"
            )


# === Loading, learning ===


def check_given_to_load(cls: Any, env: Any, device: Any, given: Mapping[str, Any], saved: Iterable[str]) -> None:
    """
    :param cls: class of the model
    :param env: environment, or ``None``
    :param device: device of the model
    :param given: keyword arguments of ``load()``
    :param saved: names of the attributes in the file
    :raises TypeError: if one is neither an argument of the class nor an attribute in the file, or ``env`` or ``device``
        has the wrong type
    :raises ValueError: if there is no such device
    """
    _device("device", device)
    _check_env(env, may_be_none=True)
    RULES["policy_kwargs"]("policy_kwargs", given.get("policy_kwargs"))
    arguments = set(merged_signature(cls).parameters) - {"policy", "env", "device", "_init_setup_model"}
    attributes = {name for name in saved if name not in RULES and name != "policy"}
    if "policy" in given:
        raise TypeError("load() takes the policy from the file: another one is custom_objects={'policy_class': ...}")
    for name, value in given.items():
        if name not in arguments | attributes and not hasattr(cls, name):
            hint = did_you_mean(name, arguments | set(inspect.signature(cls.load).parameters))
            raise TypeError(
                f"{cls.__name__}.load() got an unexpected keyword argument {name!r}, got {shown(value)}{hint}"
            )


def check_learn_arguments(total_timesteps: Any, log_interval: Any) -> None:
    """
    :param total_timesteps: number of environment steps
    :param log_interval: iterations between logs, ``None``: no logs
    :raises TypeError: if one has the wrong type
    :raises ValueError: if one is out of range
    """
    check_number("total_timesteps", total_timesteps, 0, closed=True)
    if log_interval is not None:
        check_integer("log_interval", log_interval, 1)
