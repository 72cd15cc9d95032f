"""The state of an environment, read from its attributes and put into another one."""

import enum
import itertools
import random
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

import ale_py
import gymnasium as gym
import minigrid  # registers its environments
import numpy as np
import pandas as pd
import pytest
from stable_baselines3.common.atari_wrappers import AtariWrapper
from stable_baselines3.common.monitor import Monitor

from sb3_ppo_ewma.checkpointing.object_states import restore_state, state_of
from sb3_ppo_ewma.checkpointing.plain_data import NotPlainError, dumps, loads
from sb3_ppo_ewma.checkpointing.simulator_states import UnknownStateError
from sb3_ppo_ewma.zoo import register

assert ale_py
assert minigrid
IDS = [
    "CartPole-v1",
    "Pendulum-v1",
    "Acrobot-v1",
    "FrozenLake-v1",
    "Blackjack-v1",
    "Hopper-v5",
    "Ant-v5",
    "SeaquestNoFrameskip-v4",
    "MinAtar/Seaquest-v1",
    "MiniGrid-DoorKey-5x5-v0",
]


def make(env_id: str) -> gym.Env:
    env = gym.make(env_id)
    return Monitor(AtariWrapper(env) if "Frameskip" in env_id else env)


def step(env: gym.Env, action: Any) -> tuple[Any, ...]:
    observation, reward, terminated, truncated, _ = env.step(action)
    if terminated or truncated:
        observation = env.reset()[0]
    flat = observation["image"] if isinstance(observation, dict) else observation
    return np.asarray(flat).tolist(), reward, terminated, truncated


@pytest.mark.long
@pytest.mark.parametrize("env_id", IDS)
def test_goes_on_as_the_original(env_id: str) -> None:
    register()
    env, other = make(env_id), make(env_id)
    env.reset(seed=3)
    env.action_space.seed(1)
    for _ in range(90):
        step(env, env.action_space.sample())
    state = loads(dumps(state_of(env)))
    other.reset(seed=99)
    restore_state(other, state)
    for _ in range(150):
        action = env.action_space.sample()
        assert step(env, action) == step(other, action)


def test_sticky_actions_are_refused() -> None:
    env = gym.make("ALE/Pong-v5")
    env.reset()
    with pytest.raises(UnknownStateError, match="repeat_action_probability"):
        state_of(env)


class Mode(enum.Enum):
    SLOW, FAST = 1, 2


class Part:
    __slots__ = ("partner", "size")

    def __init__(self, size: int) -> None:
        self.size, self.partner = size, None


def double(x: int) -> int:
    return 2 * x


def treble(x: int) -> int:
    return 3 * x


def counter() -> Callable[[], int]:
    n = 0

    def count() -> int:
        nonlocal n
        n += 1
        return n

    return count


class Machine:
    def __init__(self) -> None:
        self.numbers = np.arange(3)
        self.same_numbers = self.numbers
        self.generator = np.random.default_rng(0)
        self.its_user = {"random": self.generator}
        self.old, self.python = np.random.RandomState(1), random.Random(2)
        self.mode = Mode.SLOW
        self.parts = [Part(1)]
        self.parts[0].partner = self.parts[0]
        self.queue = deque([1, 2], maxlen=3)
        self.named = OrderedDict([((1, "a"), {1, 2})])
        self.function, self.counter, self.method = double, counter(), self.forward
        self.table, self.range = pd.DataFrame({"a": [1, 2]}), range(3)
        self.count = np.float32(1.5)
        self.text, self.nothing, self.flag = "é", None, True

    def forward(self) -> None:
        pass


def changed() -> Machine:
    machine = Machine()
    machine.numbers[:] = 7
    machine.generator.normal(), machine.old.normal(), machine.python.random()
    machine.mode = Mode.FAST
    machine.counter()
    machine.parts.append(Part(5))
    machine.parts[1].partner = machine.parts[0]
    machine.queue.extend([3, 4])
    machine.named[(2, "b")] = {9}
    machine.count = np.float32(2.5)
    return machine


def test_all_kinds_of_values() -> None:
    original, copy = changed(), Machine()
    restore_state(copy, loads(dumps(state_of(original))), "machine")
    assert copy.numbers.tolist() == [7, 7, 7]
    assert copy.same_numbers is copy.numbers
    assert copy.its_user["random"] is copy.generator
    assert copy.generator.normal() == original.generator.normal()
    assert copy.old.normal() == original.old.normal()
    assert copy.python.random() == original.python.random()
    assert copy.mode is Mode.FAST
    assert copy.counter() == original.counter() == 2
    assert copy.method == copy.forward
    assert [part.size for part in copy.parts] == [1, 5]
    assert copy.parts[1].partner is copy.parts[0] is copy.parts[0].partner
    assert copy.queue == deque([2, 3, 4])
    assert copy.queue.maxlen == 3
    assert copy.named == {(1, "a"): {1, 2}, (2, "b"): {9}}
    assert type(copy.named) is OrderedDict
    assert copy.count == 2.5
    assert type(copy.count) is np.float32
    assert (copy.text, copy.nothing, copy.flag, copy.function) == ("é", None, True, double)


@pytest.mark.parametrize(
    ("name", "other"),
    [("function", treble), ("table", pd.DataFrame({"a": [1, 3]})), ("range", range(4)), ("method", double)],
)
def test_what_must_be_the_same_is_compared_and_nothing_changes(name: str, other: Any) -> None:
    original, copy = changed(), Machine()
    setattr(copy, name, other)
    with pytest.raises(UnknownStateError, match=rf"machine\.{name} was"):
        restore_state(copy, state_of(original), "machine")
    assert copy.numbers.tolist() == [0, 1, 2]
    assert copy.mode is Mode.SLOW


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (memoryview(b""), "memoryview"),
        (iter([1]), "list_iterator"),
        (np.array([None]), "numpy.ndarray"),
        ((each for each in [1]), "generator"),
        (itertools.count(), "itertools.count"),
    ],
)
def test_what_is_not_understood_is_named(value: Any, kind: str) -> None:
    machine = Machine()
    machine.parts.append({"deep": value})  # type: ignore[arg-type]
    with pytest.raises(UnknownStateError, match=rf"machine\.parts\[1\]\['deep'\] is a .*{kind}"):
        state_of(machine, "machine")


def test_no_class_is_made_by_name_from_elsewhere() -> None:
    machine = Machine()
    state = state_of(machine)
    parts = next(value for name, value in state["attributes"] if name == "parts")
    parts["items"].append({"kind": "object", "class": "tempfile:_TemporaryFileCloser", "attributes": []})
    with pytest.raises(UnknownStateError, match=r"parts\[1\] was a tempfile\._TemporaryFileCloser"):
        restore_state(machine, state)


def test_equal_data_is_equal_at_any_time(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [1, np.arange(3)]
    before = dumps(values)
    later = time.time() + 3600
    monkeypatch.setattr(time, "time", lambda: later)
    assert dumps(values) == before


def test_data_is_plain() -> None:
    values = [1, -(2**200), 1.5, float("inf"), "a", b"\0x", None, True, (1, [2]), {"a": 1, (1, 2): np.uint8(3)}]
    restored = loads(dumps(values))
    assert restored == values
    assert type(restored[-1][(1, 2)]) is np.uint8
    with pytest.raises(NotPlainError, match="object"):
        dumps([object()])
    with pytest.raises(ValueError, match="damaged"):
        loads(dumps(values)[:-30])
