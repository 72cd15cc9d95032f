"""``load(safe=True)``: what SB3, sb3-contrib and this package save loads, and nothing from a file is ever run."""

import base64
import io
import json
import pickle
import pickletools
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict, deque
from pathlib import Path
from typing import Any

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3
import torch as th
from gymnasium import spaces
from rl_zoo3.utils import SimpleLinearSchedule
from sb3_contrib import MaskablePPO, RecurrentPPO
from sb3_contrib.common.envs import InvalidActionEnvDiscrete
from stable_baselines3 import PPO
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule

import sb3_ppo_ewma
from sb3_ppo_ewma import PPG, PPOEWMA, MaskablePPGEWMA, MaskablePPOEWMA, RecurrentPPOEWMA
from sb3_ppo_ewma.checkpointing import restricted_pickle
from sb3_ppo_ewma.checkpointing.restricted_pickle import NotAllowedError, loads
from tests.battery.helpers import assert_same

QUICK: dict[str, Any] = {"n_steps": 32, "batch_size": 16, "n_epochs": 1, "device": "cpu"}
SMALL = {"net_arch": [4]}
OWN_MEMBER = "sb3_ppo_ewma_states.pt"


class Touch:
    """Hostile: unpickled, it touches a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.fixture
def touched(tmp_path: Path) -> Path:
    """:return: a file that is not there, and must not be"""
    return tmp_path / "touched"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """:return: a saved model"""
    path = tmp_path_factory.mktemp("models") / "model.zip"
    PPOEWMA("MlpPolicy", "CartPole-v1", policy_kwargs=SMALL, **QUICK).learn(32).save(path)
    return path


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def as_attribute(value: Any) -> Any:
    """:return: how SB3 writes it into JSON; bytes stand for pickles"""
    if not isinstance(value, bytes):
        return value
    return {":type:": "<class 'x'>", ":serialized:": base64.b64encode(value).decode()}


def rewritten(path: Path, new: Path, changes: dict[str, bytes] | None = None, **attributes: Any) -> Path:
    """
    :param path: a saved model
    :param new: where to write the other one
    :param changes: members of the archive to replace or to add
    :param attributes: of the model to change: bytes stand for pickles
    :return: ``new``
    """
    contents = members(path)
    data = json.loads(contents["data"]) | {name: as_attribute(value) for name, value in attributes.items()}
    contents |= {"data": json.dumps(data).encode(), **(changes or {})}
    with zipfile.ZipFile(new, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return new


def mask_env() -> gym.Env:
    return InvalidActionEnvDiscrete(dim=4, n_invalid_actions=2)


class Everything(gym.Env):
    """All kinds of observations that SB3 knows."""

    observation_space = spaces.Dict(
        {
            "vector": spaces.Box(-1, np.arange(1, 4, dtype=np.float64), (3,), np.float64),
            "image": spaces.Box(0, 255, (3, 36, 36), np.uint8),
            "one": spaces.Discrete(3),
            "several": spaces.MultiDiscrete([2, 3]),
            "bits": spaces.MultiBinary(4),
        }
    )
    action_space = spaces.Box(-1, 1, (2,))

    def reset(self, **_: Any) -> Any:
        return self.observation_space.sample(), {}

    def step(self, _: Any) -> Any:
        return self.observation_space.sample(), 0.0, False, False, {}


class Images(gym.Env):
    """Channels last: SB3 moves them, and the arrays it saves have their axes in another order."""

    observation_space = spaces.Box(0, 255, (36, 36, 3), np.uint8)
    action_space = spaces.MultiDiscrete([2, 3])
    reset, step = Everything.reset, Everything.step


OPTIMIZER = {"optimizer_class": th.optim.RMSprop, "optimizer_kwargs": {"alpha": 0.9}, "activation_fn": th.nn.ReLU}
LSTM = {"lstm_hidden_size": 4, **SMALL}
# Who saves, who loads, policy, environment, arguments
MODELS: dict[str, tuple[Any, Any, str, Any, dict[str, Any]]] = {
    "ewma": (PPOEWMA, PPOEWMA, "MlpPolicy", "CartPole-v1", {"policy_kwargs": {**SMALL, **OPTIMIZER}}),
    "numbers and paths": (
        PPOEWMA,
        PPOEWMA,
        "MlpPolicy",
        "CartPole-v1",
        {
            "ent_coef": np.float32(0.5),
            "learning_rate": LinearSchedule(1e-3, 0, 0.5),
            "clip_range": None,
            "staleness": 1,
        },
    ),
    "zoo": (PPOEWMA, PPOEWMA, "MlpPolicy", "CartPole-v1", {"learning_rate": SimpleLinearSchedule(1e-3)}),
    "ppg, dictionary": (PPG, PPG, "MultiInputPolicy", Everything, {"seed": 1, "n_policy_iterations": 2}),
    "images": (PPG, PPG, "ImpalaPolicy", Images, {"use_sde": False}),
    "ppo": (PPO, PPOEWMA, "MlpPolicy", "CartPole-v1", {}),
    "recurrent": (RecurrentPPOEWMA, RecurrentPPOEWMA, "MlpLstmPolicy", "CartPole-v1", {"policy_kwargs": LSTM}),
    "maskable": (MaskablePPOEWMA, MaskablePPOEWMA, "MlpPolicy", mask_env, {}),
    "maskable ppg": (MaskablePPGEWMA, MaskablePPGEWMA, "MlpPolicy", mask_env, {}),
    "contrib's recurrent": (RecurrentPPO, RecurrentPPOEWMA, "MlpLstmPolicy", "CartPole-v1", {"policy_kwargs": LSTM}),
    "contrib's maskable": (MaskablePPO, MaskablePPOEWMA, "MlpPolicy", mask_env, {}),
}


@pytest.mark.filterwarnings("ignore:Loaded parameters without")
@pytest.mark.parametrize("name", MODELS)
def test_what_is_saved_loads_safely(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saves, loads_it, policy, env, kwargs = MODELS[name]
    model = saves(policy, env if isinstance(env, str) else env(), **{"policy_kwargs": SMALL, **QUICK, **kwargs})
    model.learn(64).save(tmp_path / "model")
    trusted = loads_it.load(tmp_path / "model", device="cpu")

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a pickle was read by Python")

    for module, function in ((cloudpickle, "loads"), (pickle, "loads"), (pickle, "load")):
        monkeypatch.setattr(module, function, refuse)
    loaded = loads_it.load(tmp_path / "model", device="cpu", safe=True)
    monkeypatch.undo()
    assert_same(loaded.get_parameters(), trusted.get_parameters())
    for attribute in ("observation_space", "action_space", "policy_class", "rollout_buffer_class", "ep_info_buffer"):
        assert getattr(loaded, attribute) == getattr(trusted, attribute)
    assert [loaded.lr_schedule(p) for p in (1.0, 0.3)] == [trusted.lr_schedule(p) for p in (1.0, 0.3)]
    assert loaded.clip_range(1.0) == trusted.clip_range(1.0)
    assert_same(loaded._last_obs, trusted._last_obs)
    samples = [each.observation_space.sample() for each in (loaded, trusted)]
    if kwargs.get("seed") is not None:
        assert_same(*samples)  # the spaces' generators are as they were
    loaded.set_env(gym.make(env) if isinstance(env, str) else env())
    assert loaded.learn(32).num_timesteps == 32


def test_checkpoints_load_safely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = PPG("MlpPolicy", "CartPole-v1", policy_kwargs=SMALL, n_policy_iterations=3, **QUICK).learn(64)
    model.save_checkpoint(tmp_path / "run")

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a pickle was read by Python")

    for module, function in ((cloudpickle, "loads"), (pickle, "loads"), (pickle, "load")):
        monkeypatch.setattr(module, function, refuse)
    loaded = PPG.load_checkpoint(tmp_path / "run", gym.make("CartPole-v1"), device="cpu", safe=True)
    assert_same(loaded.get_parameters(), model.get_parameters())
    assert len(loaded.phase_buffer) == 2


def test_functions_are_named_and_can_be_given(tmp_path: Path) -> None:
    model = PPOEWMA("MlpPolicy", "CartPole-v1", learning_rate=lambda p: p, clip_range=lambda p: 0.1 * p, **QUICK)
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match="model: safe=True cannot take all") as refusal:
        PPOEWMA.load(tmp_path / "model", safe=True)
    for name in ("learning_rate", "lr_schedule", "clip_range"):
        assert f"\n  {name} needs cloudpickle.cloudpickle." in str(refusal.value)
    given = {"learning_rate": 1e-3, "lr_schedule": lambda _: 1e-3, "clip_range": 0.2}
    assert "custom_objects={'learning_rate': ..., 'clip_range': ..., 'lr_schedule': ...}" in str(refusal.value)
    loaded = PPOEWMA.load(tmp_path / "model", safe=True, custom_objects=given)
    assert (loaded.lr_schedule(1.0), loaded.clip_range(1.0)) == (1e-3, 0.2)


class OwnPolicy(stable_baselines3.common.policies.ActorCriticPolicy):
    """Of a user."""


def test_classes_of_the_user_are_named_and_can_be_given(tmp_path: Path) -> None:
    PPOEWMA(OwnPolicy, "CartPole-v1", policy_kwargs=SMALL, **QUICK).save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"\n  policy_class needs tests\.test_safe_loading\.OwnPolicy"):
        PPOEWMA.load(tmp_path / "model", safe=True)
    loaded = PPOEWMA.load(tmp_path / "model", safe=True, custom_objects={"policy_class": OwnPolicy})
    assert type(loaded.policy) is OwnPolicy


# ---------------------------------------------------------------------- hostile files


def test_no_attribute_is_unpickled(saved: Path, touched: Path, tmp_path: Path) -> None:
    hostile = pickle.dumps(Touch(touched))
    names = [name for name, value in json.loads(members(saved)["data"]).items() if isinstance(value, dict)]
    for name in (*names, "gamma", "something_else"):
        path = rewritten(saved, tmp_path / "hostile.zip", **{name: hostile})
        with pytest.raises(ValueError, match=rf"hostile\.zip: safe=True .*\n  {name} needs pathlib\.Path\.touch"):
            PPOEWMA.load(path, safe=True)
        assert not touched.exists()
    path = rewritten(saved, tmp_path / "hostile.zip", something_else=hostile)
    PPOEWMA.load(path, safe=True, custom_objects={"something_else": 1})
    assert not touched.exists()
    PPOEWMA.load(path)  # as SB3
    assert touched.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore:'torch.load' received a zip file that looks")
@pytest.mark.parametrize("form", ["pickle", "torch", "old torch", "torchscript"])
@pytest.mark.parametrize("member", ["policy.pth", "policy.optimizer.pth", "pytorch_variables.pth", "x.pth", OWN_MEMBER])
def test_no_member_is_unpickled(saved: Path, touched: Path, tmp_path: Path, member: str, form: str) -> None:
    hostile, content = {"x": Touch(touched)}, io.BytesIO()
    if form == "pickle":
        pickle.dump(hostile, content)
    elif form == "torchscript":
        th.jit.save(th.jit.script(th.nn.Linear(1, 1)), content)
    else:
        th.save(hostile, content, _use_new_zipfile_serialization=form == "torch")
    path = rewritten(saved, tmp_path / "hostile.zip", {member: content.getvalue()})
    model = PPOEWMA("MlpPolicy", "CartPole-v1", policy_kwargs=SMALL, **QUICK)
    before = model.get_parameters()["policy"]["action_net.weight"].clone()
    for load in (lambda: PPOEWMA.load(path, safe=True), lambda: PPOEWMA.load(path), lambda: model.set_parameters(path)):
        with pytest.raises((ValueError, RuntimeError), match=r"hostile\.zip"):
            load()
        assert not touched.exists()
    assert th.equal(model.get_parameters()["policy"]["action_net.weight"], before)


def test_tensors_cannot_be_put_anywhere(saved: Path, tmp_path: Path) -> None:
    """SB3 puts the tensors of this member wherever their names say, after all that was checked."""
    for name in ("policy.action_net.weight", "__class__"):
        variables = io.BytesIO()
        th.save({name: th.nn.Parameter(th.full((2, 4), th.nan))}, variables)
        path = rewritten(saved, tmp_path / "hostile.zip", {"pytorch_variables.pth": variables.getvalue()})
        with pytest.raises(ValueError, match=rf"hostile\.zip: tensors \['{name}'\], which the model does not have"):
            PPOEWMA.load(path, device="cpu")
    assert not hasattr(PPOEWMA, "data")


def test_no_environment_is_made_and_no_method_replaced(saved: Path, tmp_path: Path) -> None:
    path = rewritten(saved, tmp_path / "hostile.zip", env="this:CartPole-v1", train=pickle.dumps(deque), predict="x")
    with pytest.raises(ValueError, match=r"\n  env would make an environment by its name") as refusal:
        PPOEWMA.load(path, safe=True)
    assert "\n  train would replace a method of PPOEWMA" in str(refusal.value)
    assert "\n  predict would replace a method of PPOEWMA" in str(refusal.value)
    assert "this" not in sys.modules


def bomb(name: str) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(name, bytes(2**24))
    return archive.getvalue()


def test_bombs_are_refused(saved: Path, tmp_path: Path) -> None:
    path = rewritten(saved, tmp_path / "hostile.zip", {"policy.pth": bomb("archive/data/0")})
    with pytest.raises(ValueError, match=r"hostile\.zip: .* bytes that claim to unpack to"):
        PPOEWMA.load(path, safe=True)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../../outside", bytes(2**25))
    with pytest.raises(ValueError, match=r"hostile\.zip: .* bytes that claim to unpack to"):
        PPOEWMA.load(path, safe=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["hostile.zip"]


def test_versions_of_torch_with_an_unsafe_reader_are_named(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(th, "__version__", "2.9.1+cpu")
    with pytest.warns(UserWarning, match=r"before PyTorch 2\.10, and this is 2\.9\.1\+cpu"):
        PPOEWMA.load(saved, safe=True)


def test_safe_must_be_a_truth_value(saved: Path) -> None:
    with pytest.raises(TypeError, match="safe must be True or False, got 'yes'"):
        PPOEWMA.load(saved, safe="yes")  # type: ignore[arg-type]


# ---------------------------------------------------------------------- the reader of pickles


class Reduces:
    """:param reduced: result of ``__reduce__``"""

    def __init__(self, *reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> Any:
        return self.reduced


def opcodes(text: bytes) -> bytes:
    """:return: a pickle of protocol 2 with these opcodes"""
    return b"\x80\x02" + text + b"."


HARMLESS: list[Any] = [
    *(None, True, 3, -(2**70), 0.5, "text", b"bytes", bytearray(b"b")),
    *((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [], [1], [1, 2], {}, {"a": 1}, {"a": 1, "b": [2]}, {1, 2}),
    *(frozenset({1}), deque([1, 2], maxlen=3), OrderedDict(a=1, b=2)),
    *(np.float64(1.5), np.int8(3), np.bool_(True), np.dtype("<f4"), Path("a/b"), th.nn.ReLU, th.optim.AdamW),
    *(cls.policy_aliases for cls in (PPO, PPG, MaskablePPOEWMA, RecurrentPPOEWMA, RecurrentPPO)),
    spaces.Tuple((spaces.Discrete(2), spaces.MultiBinary([2, 2]))),
]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("value", HARMLESS, ids=lambda value: type(value).__name__)
def test_harmless_objects_are_read(value: Any, protocol: int) -> None:
    since = {bytearray: 5, set: 4, frozenset: 4, bytes: 3, np.float64: 3, np.int8: 3, np.bool_: 3, spaces.Tuple: 3}
    if protocol < since.get(type(value), 2):
        pytest.skip("pickled by functions that are not on the list, which cloudpickle has not used since Python 3.8")
    result = loads(pickle.dumps(value, protocol))
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize("protocol", [4, 5])
@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.arange(6.0).reshape(2, 3).T,
        np.arange(24.0).reshape(2, 3, 4).transpose(1, 2, 0),
        np.arange(24.0).reshape(2, 3, 4).transpose(1, 0, 2)[:, :, 1:],
        np.arange(10)[::2],
        np.zeros((0, 3)),
        np.array(5),
        np.array(["a", "bc"]),
        np.array([True]),
    ],
    ids=str,
)
def test_arrays_are_read(array: np.ndarray, protocol: int) -> None:
    result = loads(pickle.dumps(array, protocol))
    assert np.array_equal(result, array)
    assert (result.dtype, result.shape, result.flags.writeable) == (array.dtype, array.shape, True)


@pytest.mark.parametrize("name", ["PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64"])
def test_generators_go_on(name: str) -> None:
    generator = np.random.Generator(getattr(np.random, name)(5))
    generator.normal(size=3)
    result = loads(pickle.dumps(generator))
    assert np.array_equal(result.normal(size=5), generator.normal(size=5))
    assert np.array_equal(*(each.spawn(1)[0].normal(size=2) for each in (result, generator)))


@pytest.mark.parametrize("place", ["pos", "buffer_pos"])
def test_generators_cannot_read_beyond_their_arrays(place: str) -> None:
    """NumPy takes any position, and reads there."""
    generator = np.random.MT19937(5) if place == "pos" else np.random.Philox(5)
    for position in (-1, 10**6):
        state = generator.state
        (state["state"] if place == "pos" else state)[place] = position
        hostile = Reduces(np.random._pickle.__dict__["__bit_generator_ctor"], (type(generator).__name__,), state)
        with pytest.raises(ValueError, match=f"a generator at position {position}"):
            loads(pickle.dumps(hostile))


def test_schedules_are_read() -> None:
    for schedule in (FloatSchedule(0.3), FloatSchedule(LinearSchedule(1, 0, 0.5)), SimpleLinearSchedule(2.0)):
        assert [loads(pickle.dumps(schedule))(p) for p in (1.0, 0.6, 0.0)] == [schedule(p) for p in (1.0, 0.6, 0.0)]


def hostile_pickles(path: Path) -> dict[str, bytes]:
    """:return: pickles that want to run something, mostly ``Path.touch``, by the way in which they try"""
    call = pickle.dumps(Touch(path))
    wheel = FloatSchedule(0.5)
    wheel.value_schedule = Touch(path)
    objects = np.array([Touch(path)], dtype=object)
    return {
        "a call": call,
        "a call in old opcodes": pickle.dumps(Touch(path), 0),
        "os.system": opcodes(b"cos\nsystem\nX\x04\x00\x00\x00true\x85R"),
        "eval": opcodes(b"cbuiltins\neval\nX\x03\x00\x00\x001+1\x85R"),
        "getattr": opcodes(b"cbuiltins\ngetattr\ncbuiltins\nprint\nX\x04\x00\x00\x00self\x86R"),
        "an attribute of a class on the list": opcodes(b"ccollections\ndeque.__init__\n)R"),
        "a module of a module on the list": opcodes(b"cstable_baselines3.common.utils\nos.system\n)R"),
        "a function beside a class on the list": opcodes(b"cstable_baselines3.common.utils\nset_random_seed\n)R"),
        "an instance by INST": opcodes(b"(X\x04\x00\x00\x00trueios\nsystem\n"),
        "an instance by OBJ": opcodes(b"(cos\nsystem\nX\x04\x00\x00\x00trueo"),
        "a persistent object": opcodes(b"Pname\n"),
        "an extension": opcodes(b"\x82\x01"),
        "a class on the list called": opcodes(b"ctorch.optim.adam\nAdam\n)R"),
        "a class on the list made": opcodes(b"ctorch.optim.adam\nAdam\n)\x81"),
        "a policy made": pickle.dumps(Reduces(PPOEWMA.policy_aliases["MlpPolicy"], ())),
        "an attribute set on a class": opcodes(
            b"cstable_baselines3.common.utils\nFloatSchedule\nN}X\x08\x00\x00\x00__call__cbuiltins\nprint\ns\x86b"
        ),
        "an attribute set on a class on the list": opcodes(
            b"cstable_baselines3.common.utils\nFloatSchedule\nN}X\x08\x00\x00\x00__call__ccollections\ndeque\ns\x86b"
        ),
        "an item set on a class": opcodes(b"ccollections\nOrderedDict\nK\x01K\x02s"),
        "a list of class": opcodes(b"ccollections\ndeque\nK\x01a"),
        "a method hidden in a space": opcodes(
            b"cgymnasium.spaces.discrete\nDiscrete\n)\x81}X\x06\x00\x00\x00sampleccollections\ndeque\nsb"
        ),
        "a function in a schedule": pickle.dumps(wheel),
        "a class in a schedule": opcodes(
            b"cstable_baselines3.common.utils\nFloatSchedule\n)\x81}X\x0e\x00\x00\x00value_schedulectorch.nn.modules.activation\n"
            b"ReLU\nsb"
        ),
        "an array of objects": pickle.dumps(objects, 5),
        "an old array of objects": pickle.dumps(objects, 4),
        "a dtype of objects": opcodes(b"cnumpy\ndtype\nX\x02\x00\x00\x00O8\x89\x88\x87R"),
        "an array of another class": opcodes(b"cnumpy._core.multiarray\n_reconstruct\nccollections\ndeque\n\x85R"),
        "a scalar of objects": pickle.dumps(Reduces(np._core.multiarray.scalar, (np.dtype("O"), Touch(path)))),
        "a nested pickle": pickle.dumps(Reduces(pickle.loads, (call,))),
        "a nested pickle of torch": pickle.dumps(th.zeros(1)),
        "a deque of a hostile iterator": pickle.dumps(Reduces(deque, (Touch(path),))),
        "a generator by hostile name": opcodes(b"cnumpy.random._pickle\n__generator_ctor\nX\x02\x00\x00\x00os\x85R"),
        "a function by value": cloudpickle.dumps(lambda: path.touch()),
        "a class by value": cloudpickle.dumps(type("Local", (), {"method": lambda _: path.touch()})),
        "a partial function": pickle.dumps(__import__("functools").partial(Path.touch, path)),
        "a module": cloudpickle.dumps(__import__("os")),
    }


@pytest.mark.parametrize("name", hostile_pickles(Path("unused")))
def test_hostile_pickles_are_refused(name: str, touched: Path) -> None:
    call_before = FloatSchedule.__call__
    hostile = hostile_pickles(touched)[name]
    with pytest.raises(ValueError, match=r"."):
        loads(hostile)
    assert not touched.exists()
    assert FloatSchedule.__call__ is call_before


def test_modules_are_imported_only_from_the_list() -> None:
    code = (
        "import sys\n"
        "from sb3_ppo_ewma.checkpointing.restricted_pickle import NotAllowedError, loads\n"
        "for text in (b'cantigravity\\nx\\n', b'ctests.customizations\\nx\\n', b'csb3_contrib.ars.ars\\nARS\\n'):\n"
        "    before = set(sys.modules)\n"
        "    try:\n"
        "        loads(b'\\x80\\x02' + text + b'.')\n"
        "    except NotAllowedError as error:\n"
        "        assert text.decode().split()[0][1:] in str(error)\n"
        "    else:\n"
        "        raise SystemExit('not refused')\n"
        "    assert set(sys.modules) == before\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_every_class_on_the_list_is_there() -> None:
    for module, names in restricted_pickle._CLASSES.items():
        for name in names.split():
            cls = loads(opcodes(f"c{module}\n{name}\n".encode()))
            assert isinstance(cls, type)
            assert cls.__name__ == name.rstrip("_")


def test_own_policies_are_on_the_list() -> None:
    for name in sb3_ppo_ewma.__all__:
        for policy in getattr(getattr(sb3_ppo_ewma, name), "policy_aliases", {}).values():
            assert loads(pickle.dumps(policy)) is policy


def test_damaged_pickles_are_refused() -> None:
    whole = pickle.dumps({"space": spaces.Box(-1, 1, (3,)), "schedule": FloatSchedule(0.5), "list": [1, 2, (3,)]})
    assert pickletools.genops is restricted_pickle.pickletools.genops
    for length in range(0, len(whole), 5):
        with pytest.raises(ValueError, match="damaged"):
            loads(whole[:length])
    for text in (b"", b"0", b"R", b"\x85", b"K\x01\x86", b"h\x07", b"t", b"(", b"K\x01K\x02", b"]K\x01s", b"\x8a\xff"):
        with pytest.raises(ValueError, match=r"."):
            loads(opcodes(text))
    with pytest.raises(NotAllowedError, match=r"numpy\.dtype of byte order '>'"):
        loads(pickle.dumps(np.dtype(">f4")))
    too_short = pickle.dumps(np.arange(4, dtype=np.uint8), 4).replace(struct.pack("4B", 0, 1, 2, 3), b"ab")
    with pytest.raises(ValueError, match=r"."):
        loads(too_short)


def test_constant_schedules_have_numbers_only() -> None:
    hostile = ConstantSchedule(0.5)
    hostile.val = [1]  # type: ignore[assignment]
    with pytest.raises(NotAllowedError, match=r"builtins\.list where it cannot be"):
        loads(pickle.dumps(hostile))
