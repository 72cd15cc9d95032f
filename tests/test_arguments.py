"""Every argument is checked when a model is built, loaded and about to learn; what cannot be is named."""

import inspect
import io
import math
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import DictRolloutBuffer, ReplayBuffer, RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import FloatSchedule
from stable_baselines3.sac.policies import SACPolicy

from benchmarks.faults import arguments
from benchmarks.faults.outcome import GOOD
from sb3_ppo_ewma import (
    PPG,
    PPGEWMA,
    PPOEWMA,
    MaskablePPGEWMA,
    MaskablePPOEWMA,
    MaskableRecurrentPPG,
    RecurrentPPG,
    RecurrentPPOEWMA,
)
from tests.battery.envs import MaskedSpaceEnv, SpaceEnv

SMALL: dict[str, Any] = {"n_steps": 8, "batch_size": 8, "n_epochs": 1, "device": "cpu", "seed": 0}
PHASE: dict[str, Any] = {"n_policy_iterations": 1, "n_aux_epochs": 1, "aux_batch_size": 8}
VECTOR = spaces.Box(-1, 1, (3,), np.float32)
DICT = spaces.Dict({"vector": VECTOR})


def make(cls: Any = PPOEWMA, policy: Any = "MlpPolicy", env: Any = None, **kwargs: Any) -> Any:
    phase = PHASE if cls is not PPOEWMA and "PPG" in cls.__name__ else {}
    kwargs = {"policy_kwargs": {"net_arch": [4]}, **kwargs}
    return cls(policy, SpaceEnv() if env is None else env, **{**SMALL, **phase, **kwargs})


def file_of(model: Any) -> io.BytesIO:
    file = io.BytesIO()
    model.save(file)
    file.seek(0)
    return file


# ---------------------------------------------------------------------- all arguments


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_nonsense_is_refused_by_name_and_valid_values_are_taken(tmp_path: Path) -> None:
    outcomes = arguments.run(250, 7, tmp_path)
    assert [each for each in outcomes if each.verdict not in GOOD] == []
    assert (
        len(Counter(each.kind for each in outcomes)) == 9
    )  # three ways each with both, names misspelt in two, breaks in training


def test_every_argument_is_among_those_tried() -> None:
    for cls in (PPGEWMA, MaskablePPGEWMA, RecurrentPPG):
        names = set(inspect.signature(cls).parameters)
        assert names - set(arguments.parameters_of(cls)) == {"policy", "env", "_init_setup_model"}


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"max_grad_norm": -1}, ValueError, "max_grad_norm must be >= 0, got -1"),
        ({"learning_rate": -1e-3}, ValueError, "learning_rate must be >= 0, got -0.001"),
        ({"learning_rate": float}, TypeError, r"learning_rate must be a number \(>= 0\), got <class 'float'>"),
        ({"learning_rate": lambda _: -1.0}, ValueError, "learning_rate at the start must be >= 0, got -1.0"),
        ({"learning_rate": lambda _: math.inf}, ValueError, "learning_rate at the start must be >= 0, got inf"),
        (
            {"learning_rate": lambda _: "much"},
            TypeError,
            "the schedule of learning_rate must give a number, got 'much'",
        ),
        ({"learning_rate": lambda: 1e-3}, TypeError, "learning_rate must be a number or a function of the remaining"),
        ({"clip_range": -math.inf}, ValueError, "clip_range must be below 1 .*, got -inf"),
        ({"clip_range": True}, TypeError, "clip_range must be a number below 1, a schedule or None, got True"),
        ({"clip_range_vf": "0.2"}, TypeError, "clip_range_vf must be a positive number, a schedule or None, got '0.2'"),
        (
            {"clip_range_vf": lambda _: -1.0},
            ValueError,
            "clip_range_vf must be positive.*a schedule that starts at -1.0",
        ),
        ({"ent_coef": -math.inf}, ValueError, "ent_coef must be finite, got -inf"),
        ({"n_epochs": True}, TypeError, "n_epochs must be an integer >= 1, got True"),
        ({"n_steps": 10**30}, ValueError, r"n_steps must be in \[1, 1099511627776\]"),
        (
            {"n_steps": 2**40},
            MemoryError,
            r"the rollout buffer for n_steps=1099511627776 and n_envs=1 does not fit into",
        ),
        ({"n_epochs": 10**30}, ValueError, r"n_epochs must be in \[1, 9223372036854775807\]"),
        ({"batch_size": None}, TypeError, "batch_size must be an integer >= 1, got None"),
        ({"normalize_advantage": np.ones(2)}, TypeError, "normalize_advantage must be True or False, got array"),
        ({"normalize_advantage": "false"}, TypeError, "normalize_advantage must be True or False, got 'false'"),
        ({"use_sde": True}, ValueError, r"use_sde=True \(gSDE\) needs a Box action space, got Discrete"),
        ({"use_sde": 1}, TypeError, "use_sde must be True or False, got 1"),
        ({"sde_sample_freq": -2}, ValueError, "sde_sample_freq must be >= -1, got -2"),
        ({"stats_window_size": 0}, ValueError, "stats_window_size must be >= 1, got 0"),
        ({"tensorboard_log": 3}, TypeError, "tensorboard_log must be a path or None, got 3"),
        ({"verbose": "1"}, TypeError, "verbose must be an integer >= 0, got '1'"),
        ({"seed": 2**32}, ValueError, r"seed must be in \[0, 4294967295\], got 4294967296"),
        ({"device": "gpu"}, ValueError, "device must be 'auto', the name of a device .*, got 'gpu'"),
        ({"tuned_for_n_envs": 0}, ValueError, "tuned_for_n_envs must be >= 1, got 0"),
        (
            {"rollout_buffer_class": ReplayBuffer},
            TypeError,
            "rollout_buffer_class must be a class derived from Rollout",
        ),
        ({"rollout_buffer_kwargs": {"depth": 3}}, TypeError, "rollout_buffer_kwargs must have .*, got depth=3"),
        ({"rollout_buffer_kwargs": {"gamma": 1}}, TypeError, "rollout_buffer_kwargs must have .*, got gamma=1"),
        (
            {"policy_kwargs": {"net_arhc": [8]}},
            TypeError,
            r"policy_kwargs must .*net_arhc=\[8\]. Did you mean 'net_arch'",
        ),
        ({"policy_kwargs": {"net_arch": "64"}}, TypeError, "net_arch in policy_kwargs must be a list of integers"),
        ({"policy_kwargs": {"net_arch": {"policy": [8]}}}, TypeError, "with the keys 'pi' and 'vf'"),
        ({"policy_kwargs": {"net_arch": [0]}}, ValueError, "every number in net_arch in policy_kwargs must be >= 1"),
        ({"policy_kwargs": {"activation_fn": "tanh"}}, TypeError, "activation_fn in policy_kwargs must be a class"),
        ({"policy_kwargs": {"ortho_init": 1}}, TypeError, "ortho_init in policy_kwargs must be True or False, got 1"),
        ({"policy_kwargs": {"use_sde": True}}, TypeError, "use_sde, got True: give it to PPOEWMA"),
    ],
)
def test_sb3s_arguments_are_named(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        make(**kwargs)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("kwargs", "attribute", "value"),
    [
        ({"learning_rate": np.float32(0.5)}, "learning_rate", 0.5),
        ({"clip_range": np.float32(0.25)}, "clip_range", 0.25),
        ({"clip_range_vf": np.array(0.25)}, "clip_range_vf", 0.25),
        ({"n_steps": np.int64(4), "batch_size": np.array(4)}, "n_steps", 4),
        ({"n_epochs": th.tensor(2)}, "n_epochs", 2),
        ({"gamma": Fraction(1, 2)}, "gamma", 0.5),
        ({"gae_lambda": th.tensor(0.5)}, "gae_lambda", 0.5),
        ({"normalize_advantage": np.False_, "batch_size": 1}, "normalize_advantage", False),
        ({"max_grad_norm": math.inf}, "max_grad_norm", math.inf),
        ({"target_kl": np.float64(0.5)}, "target_kl", 0.5),
        ({"prox_decay": np.float32(0.5)}, "prox_decay", 0.5),
        ({"kl_coef": np.array(0.5)}, "kl_coef", 0.5),
        ({"advantage_decay": th.tensor(0.5)}, "advantage_decay", 0.5),
        ({"verbose": False}, "verbose", 0),
        ({"seed": np.int32(3)}, "seed", 3),
        ({"tensorboard_log": Path("logs")}, "tensorboard_log", Path("logs")),
    ],
)
def test_numbers_of_other_libraries_are_numbers(kwargs: dict[str, Any], attribute: str, value: Any) -> None:
    model = make(**kwargs)
    found = getattr(model, attribute)
    found = found(1.0) if isinstance(found, FloatSchedule) else found
    assert (found, type(found)) == (value, type(value))
    if attribute != "tensorboard_log":
        assert model.learn(8).num_timesteps == 8


def test_so_many_epochs_that_target_kl_ends_them() -> None:
    model = make(n_epochs=10**12, target_kl=1e-9, learning_rate=0.1)
    assert model.learn(8)._n_updates < 100


# ---------------------------------------------------------------------- policies, spaces, buffers


@pytest.mark.parametrize(
    ("cls", "policy", "error", "message"),
    [
        (
            PPOEWMA,
            "MlpPolcy",
            ValueError,
            "policy must be one of 'MlpPolicy', .*, got 'MlpPolcy'. Did you mean 'MlpPolicy'",
        ),
        (
            PPOEWMA,
            "MlpLstmPolicy",
            ValueError,
            "policy must be one of .*, got 'MlpLstmPolicy'. Did you mean 'MlpPolicy'",
        ),
        (PPOEWMA, SACPolicy, ValueError, r"policy must be .*, which has evaluate_actions\(\), got .*SACPolicy"),
        (PPOEWMA, RecurrentActorCriticPolicy, ValueError, "policy must be .*, got the recurrent .*Recurrent"),
        (PPOEWMA, 3, TypeError, "policy must be one of .*, got 3"),
        (PPG, ActorCriticPolicy, ValueError, "which has the auxiliary value head, got .*ActorCriticPolicy"),
        (MaskablePPOEWMA, ActorCriticPolicy, ValueError, "which takes action masks, got .*ActorCriticPolicy"),
        (RecurrentPPOEWMA, ActorCriticPolicy, ValueError, "which has an LSTM, got .*ActorCriticPolicy"),
        (MaskableRecurrentPPG, RecurrentActorCriticPolicy, ValueError, "which takes action masks, got .*Recurrent"),
    ],
)
def test_policies_of_another_family_are_refused_before_anything_is_made(
    cls: Any, policy: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make(cls, policy, "NoSuchEnvironment-v0")  # which is looked up later


class Popping(ActorCriticPolicy):
    """Takes an argument of its own, and leaves the others."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.depth = kwargs.pop("depth")
        super().__init__(*args, **kwargs)


def test_policy_of_ones_own_may_take_any_argument() -> None:
    assert make(policy=Popping, policy_kwargs={"depth": 3}).policy.depth == 3
    with pytest.raises(TypeError, match="depht"):
        make(policy=Popping, policy_kwargs={"depth": 3, "depht": 3})


@pytest.mark.parametrize(
    ("cls", "policy", "space", "message"),
    [
        (
            RecurrentPPOEWMA,
            "MlpLstmPolicy",
            DICT,
            "policy must be 'MultiInputLstmPolicy' for a Dict .* got 'MlpLstmPolicy'",
        ),
        (
            RecurrentPPG,
            "CnnLstmPolicy",
            DICT,
            "policy must be 'MultiInputLstmPolicy' for a Dict .* got 'CnnLstmPolicy'",
        ),
        (PPOEWMA, "MultiInputPolicy", VECTOR, "policy='MultiInputPolicy' needs a Dict observation space, got Box"),
        (
            RecurrentPPOEWMA,
            "MultiInputLstmPolicy",
            VECTOR,
            "policy='MultiInputLstmPolicy' needs a Dict observation space",
        ),
        (PPOEWMA, "MlpPolicy", spaces.Tuple([VECTOR, VECTOR]), "observation_space must be Box, .*, got Tuple"),
        (PPOEWMA, "MlpPolicy", spaces.Text(3), "observation_space must be Box, .*, got Text"),
    ],
)
def test_spaces_that_the_policy_is_not_for(cls: Any, policy: str, space: spaces.Space[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(cls, policy, SpaceEnv(space))


def test_spaces_that_do_not_start_at_zero() -> None:
    with pytest.warns(UserWarning, match=r"action_space Discrete\(3, start=1\) does not start at 0: .* Discrete\(3\)"):
        make(env=SpaceEnv(action_space=spaces.Discrete(3, start=1)))


@pytest.mark.parametrize(
    ("cls", "kwargs", "message"),
    [
        (
            PPOEWMA,
            {"rollout_buffer_class": DictRolloutBuffer},
            "rollout_buffer_class=Dict.* with Dict obs space only, got Box",
        ),
        (
            MaskablePPOEWMA,
            {"rollout_buffer_class": RolloutBuffer},
            "rollout_buffer_class must be derived from Maskable",
        ),
    ],
)
def test_rollout_buffers_that_do_not_fit(cls: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(cls, env=MaskedSpaceEnv(), **kwargs)


@pytest.mark.parametrize(("env", "error"), [(3, TypeError), (gym.Env, TypeError), (None, ValueError)])
def test_environments_that_are_none(env: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="env must be an environment of Gymnasium, a VecEnv or the id of a registered env"):
        PPOEWMA("MlpPolicy", env)
    assert PPOEWMA("MlpPolicy", None, _init_setup_model=False).env is None


# ---------------------------------------------------------------------- loading


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            {"porx_decay": 0.5},
            TypeError,
            r"PPOEWMA.load\(\) got an unexpected .*'porx_decay', got 0.5. Did you mean 'prox_decay'",
        ),
        ({"max_grad_norm": -1}, ValueError, "max_grad_norm must be >= 0, got -1"),
        ({"target_kl": -1}, ValueError, "target_kl must be >= 0, got -1"),
        ({"batch_size": 0}, ValueError, "batch_size must be >= 1, got 0"),
        ({"n_epochs": 0}, ValueError, "n_epochs must be >= 1, got 0"),
        ({"policy_kwargs": np.ones(2)}, TypeError, "policy_kwargs must be a dictionary or None, got array"),
        ({"dveice": "cpu"}, TypeError, "'dveice', got 'cpu'. Did you mean 'device'"),
        ({"policy": "CnnPolicy"}, TypeError, "takes the policy from the file"),
        ({"policy_class": SACPolicy}, ValueError, "policy must be .*SACPolicy"),
        ({"n_envs": 3}, ValueError, "n_envs must be that of env, 1, got 3"),
        ({"use_sde": True}, ValueError, r"use_sde=True \(gSDE\) needs a Box action space, got Discrete\(3\)"),
        ({"device": "gpu"}, ValueError, "device must be 'auto', .*got 'gpu'"),
        ({"env": 3}, TypeError, "env must be an environment of Gymnasium"),
    ],
)
def test_what_load_is_given_is_checked(given: dict[str, Any], error: type[Exception], message: str) -> None:
    file = file_of(make())
    with pytest.raises(error, match=message):
        PPOEWMA.load(file, **{"env": SpaceEnv(), "device": "cpu", **given})
    if "n_envs" not in given and "env" not in given:
        with pytest.raises(error, match=message):
            PPOEWMA.load(file, **{"device": "cpu", **given})


def test_nothing_is_given_to_the_buffer() -> None:
    assert PPOEWMA.load(file_of(make()), SpaceEnv(), device="cpu", rollout_buffer_kwargs=None).learn(8)


def test_attributes_in_the_file_can_be_given_to_load() -> None:
    model = make()
    model.favourite_colour = "green"
    loaded = PPOEWMA.load(file_of(model), device="cpu", favourite_colour="red", num_timesteps=7, stats_window_size=3)
    assert (loaded.favourite_colour, loaded.num_timesteps) == ("red", 7)
    loaded.set_env(SpaceEnv())
    assert loaded.learn(8).ep_info_buffer.maxlen == 3


def test_values_in_a_file_are_checked_where_there_is_an_environment() -> None:
    model = make()
    model.max_grad_norm = -1.0
    file = file_of(model)
    with pytest.raises(ValueError, match="max_grad_norm must be >= 0, got -1"):
        PPOEWMA.load(file, SpaceEnv(), device="cpu")
    loaded = PPOEWMA.load(file, device="cpu")  # to predict
    assert loaded.predict(np.zeros(3, np.float32))[0] in (0, 1, 2)
    loaded.set_env(SpaceEnv())
    with pytest.raises(ValueError, match="max_grad_norm must be >= 0, got -1"):
        loaded.learn(8)
    assert PPOEWMA.load(file, SpaceEnv(), device="cpu", max_grad_norm=1.0).learn(8).num_timesteps == 8


def test_file_of_ppo_without_normalisation_loads_as_ppg() -> None:
    ppo = PPO("MlpPolicy", SpaceEnv(), normalize_advantage=False, policy_kwargs={"net_arch": [4]}, **SMALL)
    with pytest.raises(ValueError, match="auxiliary value head"):
        PPG.load(file_of(ppo), SpaceEnv())
    loaded = PPG.load(file_of(make(PPG)), SpaceEnv(), device="cpu", normalize_advantage=False)
    assert loaded.advantage_decay is None


# ---------------------------------------------------------------------- attributes set by hand


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("max_grad_norm", -1, ValueError, "max_grad_norm must be >= 0, got -1"),
        ("ent_coef", math.nan, ValueError, "ent_coef must be finite, got nan"),
        ("gamma", 2, ValueError, r"gamma must be in \[0, 1\], got 2"),
        ("batch_size", 0, ValueError, "batch_size must be >= 1, got 0"),
        ("clip_range", "0.2", TypeError, "clip_range must be a number below 1"),
        ("n_steps", 16, ValueError, "n_steps was set to 16 by hand, .* give n_steps to load"),
        ("n_steps", 4, AssertionError, "n_steps was set to 4 by hand"),
        ("n_envs", 2, ValueError, "n_envs was set to 2 by hand"),
        ("policy_kwargs", {"net_arch": [3]}, ValueError, r"policy_kwargs was set to .*\[3\].* by hand"),
        ("use_sde", True, ValueError, "use_sde was set to True by hand"),
    ],
)
def test_attributes_set_by_hand_are_checked_before_the_first_step(
    name: str, value: Any, error: type[Exception], message: str
) -> None:
    model = make()
    setattr(model, name, value)
    with pytest.raises(error, match=message):
        model.learn(8)
    assert model.num_timesteps == 0


def test_another_buffer_goes_with_another_number_of_steps() -> None:
    model = make()
    model.n_steps = 4
    model.rollout_buffer = RolloutBuffer(4, model.observation_space, model.action_space, device="cpu")
    assert model.learn(4).num_timesteps == 4


def test_clip_range_set_by_hand_may_be_a_number() -> None:
    model = make()
    model.clip_range, model.clip_range_vf = 0.25, np.float32(0.5)
    model.learn(8)
    assert (model.clip_range(1.0), model.clip_range_vf(1.0)) == (0.25, 0.5)
    model.clip_range = None
    model.learn(8)
    assert model.clip_range(1.0) < 0


@pytest.mark.parametrize(
    ("name", "value", "instead"),
    [
        ("learning_rate", 0.5, "set lr_schedule"),
        ("gamma", 0.5, r"set rollout_buffer\.gamma"),
        ("gae_lambda", 0.5, r"set rollout_buffer\.gae_lambda"),
        ("seed", 5, "set_random_seed"),
    ],
)
def test_attributes_without_effect_are_said(name: str, value: Any, instead: str) -> None:
    model = make()
    setattr(model, name, value)
    with pytest.warns(UserWarning, match=f"{name} was set to {value} by hand, which is not what .*{instead}"):
        model.learn(8)


@pytest.mark.filterwarnings("error")
def test_attributes_with_an_effect_are_not() -> None:
    model = make()
    model.learning_rate = 0.5
    model._setup_lr_schedule()
    model.gamma = model.rollout_buffer.gamma = 0.5
    model.learn(8)
    assert model.policy.optimizer.param_groups[0]["lr"] == 0.5


class AtRolloutEnd(BaseCallback):
    """Does something to the model at the end of the first rollout."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        self.change = change

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.change(self.model)


@pytest.mark.parametrize("cls", [PPOEWMA, PPG])
@pytest.mark.parametrize("name", ["lr_schedule", "aux_lr_schedule"])
def test_learning_rates_with_which_steps_overflow(name: str, cls: Any) -> None:
    if name == "aux_lr_schedule" and cls is PPOEWMA:
        return
    model = make(cls)
    before = [parameter.clone() for parameter in model.policy.parameters()]
    with pytest.raises(ValueError, match=r"learning_rate gives 1e\+300, which must be at most 1e\+30"):
        model.learn(8, AtRolloutEnd(lambda model: setattr(model, name, lambda _: 1e300)))
    is_same = all(map(th.equal, before, model.policy.parameters()))
    assert is_same == (name == "lr_schedule")
    with pytest.raises(ValueError, match=r"learning_rate must be at most 1e\+30, got 1e\+300"):
        make(cls, learning_rate=1e300)


@pytest.mark.parametrize("n_arguments", [(math.nan, 1), ("100", 1), (-1, 1), (8, 0), (8, 1.5)])
def test_arguments_of_learn(n_arguments: tuple[Any, Any]) -> None:
    model = make()
    with pytest.raises((TypeError, ValueError), match=r"total_timesteps must be|log_interval must be"):
        model.learn(n_arguments[0], log_interval=n_arguments[1])
    assert model.learn(1e1, log_interval=None).num_timesteps == 16


def test_training_needs_a_whole_rollout() -> None:
    model = make()
    with pytest.raises(ValueError, match=r"train\(\) needs a whole rollout, the rollout buffer has 0 of 8 steps"):
        model.train()
