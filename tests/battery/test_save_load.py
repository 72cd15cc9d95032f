"""
Saving and loading of models and policies.
"""

import base64
import io
import json
import pathlib
import pickle
import tempfile
import warnings
import zipfile
from copy import deepcopy
from typing import Any

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import CheckpointCallback
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, get_device
from stable_baselines3.common.vec_env import DummyVecEnv

from tests.battery.algorithms import Algorithm
from tests.battery.envs import OBSERVATION_SPACES, SpaceEnv, box_env, copies
from tests.battery.helpers import (
    assert_same,
    assert_trained,
    auxiliary_head,
    copy_parameters,
    torch_objects,
    unchanged,
)

SPACES = ["vector", "discrete", "image_channels_last", "image_channels_first", "dict"]
OWN_STATES = "sb3_ppo_ewma_states.pt"
ACTIONS_AND_SDE = [("box", False), ("box", True), ("discrete", False), ("multidiscrete", False), ("multibinary", False)]


def observations(env: Any, n: int = 6) -> Any:
    """
    :return: a batch of observations
    """
    samples = [env.observation_space.sample() for _ in range(n)]
    if isinstance(samples[0], dict):
        return {key: np.stack([sample[key] for sample in samples]) for key in samples[0]}
    return np.stack(samples)


@pytest.mark.long
@pytest.mark.parametrize(("action_space", "use_sde"), ACTIONS_AND_SDE, ids=lambda value: str(value))
@pytest.mark.parametrize("space", SPACES)
def test_every_policy(algo: Algorithm, space: str, action_space: str, use_sde: bool, tmp_path: pathlib.Path) -> None:
    env = SpaceEnv(OBSERVATION_SPACES[space], action_space)
    model = algo.make(env, use_sde=use_sde).learn(32)
    batch = observations(env)
    actions, _ = model.predict(batch, deterministic=True)
    saved = deepcopy(model.get_parameters())
    model.save(tmp_path / "model.zip")
    loaded = algo.cls.load(tmp_path / "model.zip", env=env, device="cpu")
    assert_same(saved, loaded.get_parameters())
    assert np.array_equal(actions, loaded.predict(batch, deterministic=True)[0])
    before = copy_parameters(loaded)
    loaded.learn(32)
    assert_trained(loaded, before)
    # The policy alone
    model.policy.save(tmp_path / "policy.pkl")
    policy = type(model.policy).load(tmp_path / "policy.pkl", device="cpu")
    assert_same(dict(model.policy.state_dict()), dict(policy.state_dict()))
    assert np.array_equal(actions, policy.predict(batch, deterministic=True)[0])


@pytest.mark.parametrize("share", [True, False], ids=["shared", "unshared"])
def test_average_alone(average_algo: Algorithm, share: bool, tmp_path: pathlib.Path) -> None:
    for space in ("vector", "dict"):
        env = SpaceEnv(OBSERVATION_SPACES[space], "box")
        model = average_algo.make(env, policy_kwargs=average_algo.sharing(share)).learn(32)
        average = model.proximal_policy
        average.save(tmp_path / "average.pkl")
        loaded = type(average).load(tmp_path / "average.pkl", device="cpu")
        assert_same(dict(average.state_dict()), dict(loaded.state_dict()))
        batch = observations(env)
        assert np.array_equal(*(policy.predict(batch, deterministic=True)[0] for policy in (average, loaded)))


@pytest.mark.filterwarnings("ignore:Path .* does not exist. Will create it")
def test_every_kind_of_path(algo: Algorithm, tmp_path: pathlib.Path) -> None:
    model = algo.make(SpaceEnv()).learn(16)
    for path in (str(tmp_path / "a"), str(tmp_path / "b.zip"), tmp_path / "c", tmp_path / "folder" / "d.zip"):
        expected = model.get_parameters()
        model.save(path)
        assert_same(algo.cls.load(path, device="cpu").get_parameters(), expected)
    assert {p.name for p in tmp_path.iterdir()} == {"a.zip", "b.zip", "c.zip", "folder"}
    buffer = io.BytesIO()
    expected = model.get_parameters()
    model.save(buffer)
    buffer.seek(0)
    assert_same(algo.cls.load(buffer, device="cpu").get_parameters(), expected)
    with tempfile.TemporaryFile() as file:
        expected = model.get_parameters()
        model.save(file)
        file.seek(0)
        assert_same(algo.cls.load(file, device="cpu").get_parameters(), expected)
        assert not file.closed


@pytest.mark.filterwarnings("error")
def test_no_warnings(algo: Algorithm, tmp_path: pathlib.Path) -> None:
    """A file that stays open, a missing part or a deprecated call would warn."""
    model = algo.make(SpaceEnv()).learn(32)
    model.save(tmp_path / "model")
    loaded = algo.cls.load(tmp_path / "model", env=SpaceEnv(), device="cpu").learn(32)
    loaded.save(str(tmp_path / "model"))
    algo.cls.load(str(tmp_path / "model"), device="cpu")
    model.set_parameters(str(tmp_path / "model"))


@pytest.mark.parametrize("device", ["cpu", "auto", "cuda"])
@pytest.mark.filterwarnings("ignore:You are trying to run")
def test_device(algo: Algorithm, device: str, tmp_path: pathlib.Path) -> None:
    model = algo.make(SpaceEnv()).learn(16)
    model.save(tmp_path / "model")
    # Without CUDA, "cuda" falls back to the CPU.
    loaded = algo.cls.load(tmp_path / "model", env=SpaceEnv(), device=device)
    assert loaded.device.type == loaded.policy.device.type == get_device(device).type
    for name, value in loaded.policy.state_dict().items():
        assert value.device.type == get_device(device).type
        assert th.equal(value.cpu(), model.policy.state_dict()[name])
    assert loaded.learn(16).num_timesteps == 16


def test_counters_go_on(algo: Algorithm, tmp_path: pathlib.Path) -> None:
    model = algo.make(SpaceEnv()).learn(32)
    model.save(tmp_path / "model")
    loaded = algo.cls.load(tmp_path / "model", env=SpaceEnv(), device="cpu")
    assert (loaded.num_timesteps, loaded._n_updates) == (32, 4)
    loaded.learn(16, reset_num_timesteps=False)
    assert (loaded.num_timesteps, loaded._n_updates) == (48, 6)
    assert (model.num_timesteps, model._n_updates) == (32, 4)


def test_optimizer_state_is_kept(algo: Algorithm, tmp_path: pathlib.Path) -> None:
    policy_kwargs = {"optimizer_class": th.optim.RMSprop, "optimizer_kwargs": {"momentum": 0.9}}
    for kwargs in ({}, {"policy_kwargs": policy_kwargs}):
        model = algo.make(SpaceEnv(), learning_rate=0.01, **kwargs).learn(32)
        model.save(tmp_path / "model")
        loaded = algo.cls.load(tmp_path / "model", device="cpu")
        state = loaded.policy.optimizer.state_dict()
        assert_same(model.policy.optimizer.state_dict(), state)
        assert len(state["state"]) > 0
        assert type(loaded.policy.optimizer) is type(model.policy.optimizer)


def test_hyperparameters_are_kept(algo: Algorithm, tmp_path: pathlib.Path) -> None:
    kwargs = {
        "gamma": 0.9,
        "gae_lambda": 0.8,
        "ent_coef": 0.01,
        "vf_coef": 0.7,
        "max_grad_norm": 0.3,
        "target_kl": 0.5,
        "normalize_advantage": False,
        "n_steps": 12,
        "batch_size": 6,
        "n_epochs": 4,
    }
    kwargs |= {**algo.kwargs, **algo.normalizing_as_ppo()}
    algo.make(SpaceEnv(), clip_range=0.3, clip_range_vf=0.4, learning_rate=1e-3, **kwargs).save(tmp_path / "model")
    loaded = algo.cls.load(tmp_path / "model", device="cpu")
    assert {name: getattr(loaded, name) for name in kwargs} == kwargs
    assert (loaded.clip_range(1.0), loaded.clip_range_vf(1.0), loaded.lr_schedule(1.0)) == (0.3, 0.4, 1e-3)


def test_schedules_are_kept(algo: Algorithm, tmp_path: pathlib.Path) -> None:
    # Numbers are stored as objects of a class, which other Python versions can read, functions by value.
    algo.make(SpaceEnv()).save(tmp_path / "constant")
    constant = algo.cls.load(tmp_path / "constant", device="cpu")
    assert isinstance(constant.clip_range, FloatSchedule)
    assert isinstance(constant.clip_range.value_schedule, ConstantSchedule)
    assert constant.clip_range.value_schedule.val == 0.2
    kwargs = {"learning_rate": lambda p: p * np.float64(0.5), "clip_range": lambda p: 0.1 * p}
    model = algo.make(SpaceEnv(), **kwargs, clip_range_vf=lambda p: 2 * p)
    assert type(model.lr_schedule(1.0)) is float
    model.save(tmp_path / "functions")
    loaded = algo.cls.load(tmp_path / "functions", env=SpaceEnv(), device="cpu")
    assert type(loaded.lr_schedule(1.0)) is float
    assert (loaded.lr_schedule(0.5), loaded.clip_range(0.5), loaded.clip_range_vf(0.5)) == (0.25, 0.05, 1.0)
    assert loaded.learn(16).num_timesteps == 16


def test_arguments_of_load(algo: Algorithm, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    algo.make(SpaceEnv(), verbose=2).save(tmp_path / "model")
    custom_objects = {"learning_rate": 2e-5, "unknown": 1}
    loaded = algo.cls.load(tmp_path / "model", device="cpu", custom_objects=custom_objects, print_system_info=True)
    assert loaded.learning_rate == 2e-5
    assert loaded.policy.optimizer.param_groups[0]["lr"] == 3e-4  # that of the saved state, until training
    assert not hasattr(loaded, "unknown")
    assert "SAVED MODEL SYSTEM INFO" in capsys.readouterr().out
    changed = algo.cls.load(tmp_path / "model", env=SpaceEnv(), device="cpu", n_steps=24, batch_size=12, gamma=0.5)
    assert (changed.rollout_buffer.buffer_size, changed.rollout_buffer.gamma, changed.batch_size) == (24, 0.5, 12)
    assert changed.learn(24).num_timesteps == 24
    with pytest.raises(ValueError, match="policy kwargs do not equal"):
        algo.cls.load(tmp_path / "model", device="cpu", policy_kwargs={"net_arch": [3]})


def test_loaded_to_be_watched(algo: Algorithm, tmp_path: pathlib.Path) -> None:
    """As rl-zoo3's ``enjoy`` loads: schedules replaced by zero, so that old files need not be unpickled."""
    model = algo.make(SpaceEnv(), learning_rate=lambda p: 1e-3 * p).learn(16)
    model.save(tmp_path / "model")
    custom_objects = {"learning_rate": 0.0, "lr_schedule": lambda _: 0.0, "clip_range": lambda _: 0.0}
    loaded = algo.cls.load(tmp_path / "model", custom_objects=custom_objects, device="cpu", seed=1)
    batch = observations(SpaceEnv())
    assert np.array_equal(*(m.predict(batch, deterministic=True)[0] for m in (model, loaded)))


def test_exclude_and_include(algo: Algorithm, tmp_path: pathlib.Path) -> None:
    model = algo.make(SpaceEnv(), gamma=0.5)
    model.save(tmp_path / "model", exclude=["gamma"])
    assert algo.cls.load(tmp_path / "model", device="cpu").gamma == 0.99
    model.save(tmp_path / "model", exclude=["gamma"], include=["gamma"])
    assert algo.cls.load(tmp_path / "model", device="cpu").gamma == 0.5


# ---------------------------------------------------------------------- environments


def test_set_env(algo: Algorithm, tmp_path: pathlib.Path) -> None:
    model = algo.make(DummyVecEnv([SpaceEnv])).learn(16)
    model.set_env(DummyVecEnv([SpaceEnv]), force_reset=True)
    assert model._last_obs is None
    model.learn(16)
    model.set_env(SpaceEnv())
    model.learn(16)
    model.set_env(model.get_env(), force_reset=False)
    assert model._last_obs is not None
    assert model.learn(16, reset_num_timesteps=False).num_timesteps == 32

    env = model.get_env()
    model.save(tmp_path / "model")
    kept = algo.cls.load(tmp_path / "model", env=env, force_reset=False, device="cpu")
    assert np.array_equal(kept._last_obs, model._last_obs)
    assert kept.learn(16, reset_num_timesteps=False).num_timesteps == 48
    fresh = algo.cls.load(tmp_path / "model", env=SpaceEnv(), device="cpu")
    assert fresh._last_obs is None
    assert fresh.learn(16, reset_num_timesteps=False).num_timesteps == 48


def test_load_first_environment_later(algo: Algorithm, tmp_path: pathlib.Path) -> None:
    algo.make(SpaceEnv()).learn(16).save(tmp_path / "model")
    model = algo.cls.load(tmp_path / "model", device="cpu")
    assert model.get_env() is None
    assert model.predict(np.zeros(3, np.float32))[0].shape == ()
    model.set_env(SpaceEnv())
    assert model.learn(16, reset_num_timesteps=False).num_timesteps == 32


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1)])
def test_another_number_of_environments(algo: Algorithm, before: int, after: int, tmp_path: pathlib.Path) -> None:
    algo.make(DummyVecEnv(copies(SpaceEnv, before))).learn(48).save(tmp_path / "model")
    env = DummyVecEnv(copies(SpaceEnv, after))
    model = algo.cls.load(tmp_path / "model", env=env, device="cpu")
    assert (model.n_envs, model.rollout_buffer.n_envs) == (after, after)
    parameters = copy_parameters(model)
    model.learn(16 * after)
    assert model.num_timesteps == 16 * after
    assert_trained(model, parameters, phase=False)


def test_sde_with_another_number_of_environments(algo: Algorithm, tmp_path: pathlib.Path) -> None:
    algo.make(box_env(), use_sde=True).learn(16).save(tmp_path / "model")
    model = algo.cls.load(tmp_path / "model", env=DummyVecEnv(copies(box_env, 3)), device="cpu")
    assert model.learn(48).num_timesteps == 48


def test_other_spaces_are_refused(algo: Algorithm, tmp_path: pathlib.Path) -> None:
    algo.make(SpaceEnv()).save(tmp_path / "model")
    with pytest.raises(ValueError, match="Observation spaces do not match"):
        algo.cls.load(tmp_path / "model", env=SpaceEnv(OBSERVATION_SPACES["matrix"]), device="cpu")
    with pytest.raises(ValueError, match="Action spaces do not match"):
        algo.cls.load(tmp_path / "model", env=box_env(), device="cpu")


# ---------------------------------------------------------------------- parameters


def test_parameters_are_those_of_ppo_and_more(algo: Algorithm) -> None:
    entries = (algo.with_plain_policy(), Algorithm(PPO))
    parameters, reference = (entry.make(SpaceEnv()).learn(16).get_parameters() for entry in entries)
    assert set(reference) == {"policy", "policy.optimizer"} <= set(parameters)
    own = list(parameters["policy"])
    assert own == [*reference["policy"], *auxiliary_head(own)]
    assert set(parameters["policy.optimizer"]) == set(reference["policy.optimizer"])
    assert all(isinstance(state, dict) for state in parameters.values())


def test_set_parameters(algo: Algorithm, tmp_path: pathlib.Path) -> None:
    source, target = algo.make(SpaceEnv(), seed=1).learn(32), algo.make(SpaceEnv(), seed=2)
    other = algo.make(SpaceEnv(), seed=3)
    saved = deepcopy(source.get_parameters())
    target.set_parameters(saved, device="cpu")
    assert_same(target.get_parameters(), saved)
    source.save(tmp_path / "model")
    other.set_parameters(tmp_path / "model", device="cpu")
    assert_same(other.get_parameters(), saved)
    # A copy: training one does not change the other.
    before = copy_parameters(source)
    target.learn(16)
    assert unchanged(source, before) == list(before)


def test_set_some_parameters(algo: Algorithm) -> None:
    model = algo.with_plain_policy().make(SpaceEnv()).learn(16)  # a shared trunk has several names
    before = copy_parameters(model)
    *names, last = before
    random = {name: th.rand_like(before[name]) for name in names}
    model.set_parameters({"policy": random}, exact_match=False)
    assert unchanged(model, before) == [last]
    assert all(th.equal(model.policy.state_dict()[name], random[name]) for name in names)
    assert model.learn(16).num_timesteps == 16


def test_wrong_parameters_are_refused(algo: Algorithm) -> None:
    model = algo.make(SpaceEnv()).learn(16)
    parameters = deepcopy(model.get_parameters())
    before = copy_parameters(model)
    for exact_match in (True, False):
        with pytest.raises(ValueError, match="not_there"):
            model.set_parameters({**parameters, "not_there": {}}, exact_match=exact_match)
    for name in ("policy", "policy.optimizer"):
        with pytest.raises(ValueError, match="Names of parameters do not match"):
            model.set_parameters({key: value for key, value in parameters.items() if key != name}, exact_match=True)
    partial = dict(list(parameters["policy"].items())[:-1])
    with pytest.raises(RuntimeError, match="Missing key"):
        model.set_parameters({**parameters, "policy": partial}, exact_match=True)
    assert unchanged(model, before) == list(before)


# ---------------------------------------------------------------------- the file


@pytest.mark.parametrize("use_sde", [False, True], ids=["plain", "sde"])
def test_json_holds_no_torch_object(algo: Algorithm, use_sde: bool, tmp_path: pathlib.Path) -> None:
    model = algo.make(box_env(), use_sde=use_sde, ent_coef=0.1, clip_range_vf=0.5).learn(32)
    model.save(tmp_path / "model")
    data, parameters, _ = load_from_zip_file(tmp_path / "model", device="cpu")
    assert {"n_steps", "gamma", "policy_kwargs", "observation_space", "num_timesteps"} <= set(data)
    assert {name: torch_objects(value) for name, value in data.items() if torch_objects(value)} == {}
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        files = set(archive.namelist())
        own = set(th.load(archive.open(OWN_STATES), weights_only=True)) if algo.own else set()
    others = {"data", "pytorch_variables.pth", "_stable_baselines3_version", "system_info.txt"}
    others |= {OWN_STATES} if algo.own else set()
    assert files == others | {f"{name}.pth" for name in parameters}
    assert set(parameters) == {"policy", "policy.optimizer"}
    of_the_run = {"generators"} if algo.own else set()
    assert set(parameters) | own == set(model.get_parameters()) | of_the_run


@pytest.mark.parametrize(
    "switches",
    [
        {"prox_decay": None, "kl_coef": 1.0, "kl_estimator": "analytic"},
        {"staleness": 1, "staleness_mode": "proximal"},
        {"advantage_decay": 0.5, "n_epochs_value": 1, "recompute_advantages": True},
    ],
    ids=str,
)
def test_json_holds_no_torch_object_with(own_algo: Algorithm, switches: dict[str, Any], tmp_path: pathlib.Path) -> None:
    own_algo.make(box_env(), **switches).learn(48).save(tmp_path / "model")
    data, _, _ = load_from_zip_file(tmp_path / "model", device="cpu")
    assert {name: torch_objects(value) for name, value in data.items() if torch_objects(value)} == {}


def test_finder_finds() -> None:
    found = torch_objects({"deep": [{"function": lambda: th.zeros(1)}, np.zeros(1), {"tensor": (th.zeros(1),)}]})
    assert found == ["Tensor"]


def test_own_parameters_are_in_the_file(own_algo: Algorithm, tmp_path: pathlib.Path) -> None:
    model = own_algo.make(SpaceEnv(), max_importance_ratio=7.0, prox_decay=0.25)
    model.save(tmp_path / "model")
    data, _, _ = load_from_zip_file(tmp_path / "model", device="cpu")
    assert {name: data[name] for name in own_algo.kwargs} == dict(own_algo.kwargs)
    assert (data["max_importance_ratio"], data["prox_decay"]) == (7.0, 0.25)


def test_files_that_cannot_be_read(algo: Algorithm, tmp_path: pathlib.Path) -> None:
    (tmp_path / "text.zip").write_text("this is no archive")
    with pytest.raises(ValueError, match="wasn't a zip-file"):
        algo.cls.load(tmp_path / "text.zip", device="cpu")
    with pytest.raises(FileNotFoundError):
        algo.cls.load(tmp_path / "missing.zip", device="cpu")


def test_an_object_that_cannot_be_unpickled(algo: Algorithm, tmp_path: pathlib.Path) -> None:
    algo.make(SpaceEnv(), learning_rate=lambda _: 1.0).save(tmp_path / "model")
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    data = json.loads(contents["data"])
    pickled = base64.b64decode(data["learning_rate"][":serialized:"])
    data["learning_rate"][":serialized:"] = base64.b64encode(pickled.replace(b"CodeType", b"CodeTyps")).decode()
    contents["data"] = json.dumps(data).encode()
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    with pytest.warns(UserWarning, match="custom_objects"):
        algo.cls.load(tmp_path / "model", device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = algo.cls.load(tmp_path / "model", device="cpu", custom_objects={"learning_rate": lambda _: 1.0})
    assert loaded.lr_schedule(1.0) == 1.0


def test_file_of_old_sb3(algo: Algorithm, tmp_path: pathlib.Path) -> None:
    """SB3 before 1.7 had one features extractor only, under one name."""
    env = SpaceEnv(OBSERVATION_SPACES["image_channels_last"])
    model = algo.make(env)
    del model.policy.pi_features_extractor
    model.save(tmp_path / "model")
    with pytest.warns(UserWarning, match=r"SB3 < 1\.7\.0"):
        loaded = algo.cls.load(tmp_path / "model", env=env, device="cpu")
    assert loaded.learn(16).num_timesteps == 16


def test_net_arch_none(algo: Algorithm, tmp_path: pathlib.Path) -> None:
    algo.make(SpaceEnv(), policy_kwargs={"net_arch": None}).save(tmp_path / "model")
    assert algo.cls.load(tmp_path / "model", device="cpu").policy.net_arch == {"pi": [64, 64], "vf": [64, 64]}


def test_model_in_memory(algo: Algorithm) -> None:
    model = algo.make(SpaceEnv()).learn(16)
    for dump in (pickle.dumps, cloudpickle.dumps):
        policy = pickle.loads(dump(model.policy))
        assert_same(dict(policy.state_dict()), dict(model.policy.state_dict()))


def test_file_of_ppo(own_algo: Algorithm, tmp_path: pathlib.Path) -> None:
    ppo = Algorithm(PPO).make(SpaceEnv()).learn(32)
    ppo.save(tmp_path / "model")
    if own_algo.has_phases:
        with pytest.raises(ValueError, match="auxiliary value head"):
            own_algo.cls.load(tmp_path / "model", env=SpaceEnv(), device="cpu")
        return
    with pytest.warns(UserWarning, match="started afresh"):
        model = own_algo.cls.load(tmp_path / "model", env=SpaceEnv(), device="cpu")
    for policy in (model.policy, model.proximal_policy):
        assert_same(dict(policy.state_dict()), dict(ppo.policy.state_dict()))
    assert_same(model.policy.optimizer.state_dict(), ppo.policy.optimizer.state_dict())
    before = copy_parameters(model)
    model.learn(16, reset_num_timesteps=False)
    assert model.num_timesteps == 48
    assert_trained(model, before)


def test_compiled_policy(algo: Algorithm, tmp_path: pathlib.Path) -> None:
    model = algo.make(SpaceEnv())
    model.policy = th.compile(model.policy, backend="eager")
    model.learn(32)
    model.save(tmp_path / "model")
    loaded = algo.cls.load(tmp_path / "model", env=gym.wrappers.TimeLimit(SpaceEnv(), 8), device="cpu")
    assert_same(dict(loaded.policy.state_dict()), dict(model.policy._orig_mod.state_dict()))
    assert loaded.learn(16).num_timesteps == 16


# ---------------------------------------------------------------------- files for plain PPO and from earlier versions


def assert_plain_ppo(ppo: PPO, model: PPO) -> None:
    """
    A PPO with the policy and optimiser of another model, which can be trained.
    """
    assert type(ppo) is PPO
    batch = observations(model.get_env())
    assert np.array_equal(*(each.predict(batch, deterministic=True)[0] for each in (ppo, model)))
    assert_same(dict(ppo.policy.state_dict()), dict(model.policy.state_dict()))
    assert_same(ppo.policy.optimizer.state_dict(), model.policy.optimizer.state_dict())
    before, n_before = copy_parameters(ppo), ppo.num_timesteps
    ppo.set_env(SpaceEnv())
    ppo.learn(16, reset_num_timesteps=False)
    assert ppo.num_timesteps == n_before + 16
    assert_trained(ppo, before, phase=False)


@pytest.mark.filterwarnings("error")
def test_ppo_loads_every_kind_of_path(own_algo: Algorithm, tmp_path: pathlib.Path) -> None:
    model = own_algo.make(SpaceEnv()).learn(32)
    buffer = io.BytesIO()
    for path in (str(tmp_path / "a"), tmp_path / "b.zip", buffer):
        model.save(path)
        buffer.seek(0)
        assert_plain_ppo(PPO.load(path, device="cpu"), model)
    with (tmp_path / "c.zip").open("wb") as file:
        model.save(file)
    assert_plain_ppo(PPO.load(tmp_path / "c", device="cpu"), model)


def test_ppo_loads_with_arguments(own_algo: Algorithm, tmp_path: pathlib.Path) -> None:
    model = own_algo.make(SpaceEnv(), clip_range=lambda p: 0.1 * p).learn(32)
    model.save(tmp_path / "model", exclude=["gamma"], include=["ep_info_buffer"])
    custom_objects = {"learning_rate": 2e-5, "lr_schedule": lambda _: 2e-5, "clip_range": lambda _: 0.3}
    ppo = PPO.load(tmp_path / "model", device="cpu", custom_objects=custom_objects, seed=1)
    assert (ppo.gamma, ppo.learning_rate, ppo.clip_range(1.0)) == (0.99, 2e-5, 0.3)
    assert_plain_ppo(ppo, model)


def test_ppo_loads_a_checkpoint(own_algo: Algorithm, tmp_path: pathlib.Path) -> None:
    model = own_algo.make(SpaceEnv()).learn(16, callback=CheckpointCallback(16, str(tmp_path)))
    ppo = PPO.load(tmp_path / "rl_model_16_steps", env=SpaceEnv(), device="cpu")
    before = copy_parameters(ppo)
    assert unchanged(model, before) != list(before)  # the checkpoint is from before the training
    ppo.learn(16, reset_num_timesteps=False)
    assert_trained(ppo, before, phase=False)


def test_ppo_refuses_a_model_without_clip(own_algo: Algorithm, tmp_path: pathlib.Path) -> None:
    model = own_algo.make(SpaceEnv(), clip_range=None).learn(32)
    buffer = io.BytesIO()
    for path in (tmp_path / "model", buffer):
        model.save(path)
        with pytest.raises(AssertionError, match=r"clip_range=None .* to_ppo\(\), or give load\(\) a clip_range"):
            PPO.load(path, device="cpu")
        ppo = PPO.load(path, device="cpu", clip_range=0.3)
        assert ppo.clip_range(1.0) == 0.3
        assert_plain_ppo(ppo, model)
        loaded = own_algo.cls.load(path, env=SpaceEnv(), device="cpu")
        assert loaded.clip_range(1.0) == model.clip_range(1.0) < 0
        assert loaded.learn(16).num_timesteps == 16
        with_clip = own_algo.cls.load(path, device="cpu", clip_range=0.3)
        assert with_clip.clip_range(1.0) == 0.3


def test_back_from_ppo(own_algo: Algorithm, tmp_path: pathlib.Path) -> None:
    own_algo.make(SpaceEnv()).learn(32).save(tmp_path / "model")
    PPO.load(tmp_path / "model", env=SpaceEnv(), device="cpu").learn(16).save(tmp_path / "model")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = own_algo.cls.load(tmp_path / "model", env=SpaceEnv(), device="cpu")
    lost = sorted(set(model.get_parameters()) - {"policy", "policy.optimizer", "generators"})
    (message,) = [str(warning.message) for warning in caught]
    assert message.startswith("Loaded parameters without ")
    assert all(name in message for name in lost)
    if model.proximal_policy is not None:
        assert_same(dict(model.proximal_policy.state_dict()), dict(model.policy.state_dict()))


@pytest.mark.filterwarnings("error")
def test_file_of_an_earlier_version(own_algo: Algorithm, tmp_path: pathlib.Path) -> None:
    """Own states were saved as SB3 saves its own."""
    model = own_algo.make(SpaceEnv()).learn(32)
    PPO.save(model, tmp_path / "model")
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        assert OWN_STATES not in archive.namelist()
    expected = deepcopy(model.get_parameters())
    assert_same(own_algo.cls.load(tmp_path / "model", device="cpu").get_parameters(), expected)
    other = own_algo.make(SpaceEnv(), seed=3)
    other.set_parameters(tmp_path / "model", device="cpu")
    assert_same(other.get_parameters(), expected)


def test_a_damaged_member_is_not_ignored(own_algo: Algorithm, tmp_path: pathlib.Path) -> None:
    own_algo.make(SpaceEnv()).save(tmp_path / "model")
    path = tmp_path / "model.zip"
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(OWN_STATES)
    content = bytearray(path.read_bytes())
    content[info.header_offset + 100 : info.header_offset + info.file_size // 2] = b"x" * (info.file_size // 2 - 100)
    path.write_bytes(content)
    for load in (own_algo.cls.load, own_algo.make(SpaceEnv()).set_parameters):
        with pytest.raises(ValueError, match=rf"model\.zip is a damaged zip file: .*'{OWN_STATES}' have changed"):
            load(path, device="cpu")


# ---------------------------------------------------------------------- own states


class Follower:
    """Derived from the policy: the sum of its parameters."""

    def __init__(self, model: PPO) -> None:
        self.model, self.total, self.seen = model, th.zeros(()), []

    def current(self) -> th.Tensor:
        return sum(parameter.detach().double().sum() for parameter in self.model.policy.parameters())

    def state_dict(self) -> dict[str, th.Tensor]:
        return {"total": self.total}

    def load_state_dict(self, state_dict: dict[str, th.Tensor], strict: bool = True) -> None:
        self.total = state_dict["total"]

    def reset(self) -> None:
        self.total = self.current()

    def parameters_loaded(self) -> None:
        self.seen.append((self.total, self.current()))


def test_state_that_follows_the_policy(own_algo: Algorithm, tmp_path: pathlib.Path) -> None:
    class Family(own_algo.cls):
        _own_states = (*own_algo.cls._own_states, "follower")

        def _setup_model(self) -> None:
            super()._setup_model()
            self.follower = Follower(self)

    model = Algorithm(Family, own_algo.kwargs, own_algo.policy_kwargs).make(SpaceEnv()).learn(32)
    model.follower.total = th.tensor(7.0)
    current = model.follower.current()
    model.save(tmp_path / "model")
    # It hears of the loaded parameters when both it and the policy have them.
    loaded = Family.load(tmp_path / "model", device="cpu")
    assert loaded.follower.seen == [(7.0, current)]
    loaded.set_parameters(model.get_parameters())
    assert loaded.follower.seen == [(7.0, current)] * 2
    # It starts afresh with a policy that comes alone, and not with an optimiser.
    parameters = {"policy": {name: value + 1 for name, value in model.policy.state_dict().items()}}
    loaded.set_parameters(parameters, exact_match=False)
    assert loaded.follower.total == loaded.follower.current() != current
    loaded.follower.total = th.tensor(7.0)
    loaded.set_parameters({"policy.optimizer": model.policy.optimizer.state_dict()}, exact_match=False)
    assert loaded.follower.total == 7
    with pytest.warns(UserWarning, match="with follower, which this model does not use: dropped"):
        own_algo.cls.load(tmp_path / "model", device="cpu")


def test_optimizers_start_afresh_as_they_are_built(own_algo: Algorithm) -> None:
    # Adagrad has its sums from the start, which begin at a number that can be given.
    kwargs = {"optimizer_class": th.optim.Adagrad, "optimizer_kwargs": {"initial_accumulator_value": 0.5}}
    model = own_algo.make(SpaceEnv(), n_epochs_value=3, policy_kwargs=kwargs).learn(32)
    parameters = deepcopy(model.get_parameters())
    del parameters["value_optimizer"]
    with pytest.warns(UserWarning, match="without value_optimizer: started afresh"):
        model.set_parameters(parameters)
    states = model.value_optimizer.state_dict()["state"].values()
    assert len(states) == len(list(model.policy.parameters()))
    assert all(bool((state["sum"] == 0.5).all()) and state["step"] == 0 for state in states)
    model.learn(16)
