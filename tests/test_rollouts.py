import io
import pickle
import random
import tracemalloc

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.type_aliases import DictRolloutBufferSamples, RolloutBufferSamples

from sb3_ppo_ewma.checkpointing.rollout_files import OtherSizeError, Step, read_rollouts, write_rollouts
from sb3_ppo_ewma.rollouts import (
    BufferMinibatches,
    DeviceMinibatches,
    PhaseBuffer,
    Rollout,
    StaleRollouts,
    device_minibatches,
    is_finite,
)

OBSERVATIONS = spaces.Box(-1, 1, (2,))


def make_rollout(value: float = 0.0, n_steps: int = 4, n_envs: int = 2) -> Rollout:
    buffer = RolloutBuffer(n_steps, OBSERVATIONS, spaces.Discrete(2), "cpu", n_envs=n_envs)
    buffer.rewards[:] = value
    buffer.full = True
    return Rollout(buffer, np.zeros((n_envs, 2)), np.zeros(n_envs, dtype=bool))


def test_rollouts_wait_their_turn():
    queue = StaleRollouts(2)
    trained = [queue.exchange(make_rollout(float(k))) for k in range(5)]
    assert trained[:2] == [None, None]
    assert [rollout.buffer.rewards[0, 0] for rollout in trained[2:]] == [0.0, 1.0, 2.0]
    assert queue.missing == 0


def test_waiting_rollouts_are_copies():
    observation_space = spaces.Dict({"a": OBSERVATIONS})
    buffer = DictRolloutBuffer(4, observation_space, spaces.Discrete(2), "cpu", n_envs=1)
    queue = StaleRollouts(1)
    queue.exchange(Rollout(buffer, {"a": np.zeros((1, 2))}, np.zeros(1, dtype=bool)))
    buffer.observations["a"][:] = 7.0
    buffer.rewards[:] = 7.0
    waiting = queue.waiting[0].buffer
    assert waiting.observations["a"].max() == 0.0
    assert waiting.rewards.max() == 0.0


def filled_queue(staleness: int) -> StaleRollouts:
    queue = StaleRollouts(staleness)
    for k in range(staleness):
        queue.exchange(make_rollout(float(k + 1)))
    return queue


def read_queue(path, staleness: int, num_timesteps: int = 16, **kwargs) -> StaleRollouts:
    parts = {"queue": StaleRollouts(staleness)}
    return read_rollouts(path, Step(num_timesteps, 2), parts, make_rollout(**kwargs).buffer)["queue"]


def test_queue_survives_a_file(tmp_path):
    path = tmp_path / "new_folder" / "queue"
    write_rollouts(path, Step(16, 2), {"queue": filled_queue(2)})
    assert [path.name for path in (tmp_path / "new_folder").iterdir()] == ["queue.pkl"]
    restored = read_queue(path, 2)
    assert restored.missing == 0
    assert restored.exchange(make_rollout()).buffer.rewards[0, 0] == 1.0


def test_restored_rollouts_are_on_the_device_of_the_model(tmp_path):
    buffer = make_rollout().buffer
    write_rollouts(tmp_path / "queue", Step(8, 2), {"queue": filled_queue(1)})
    buffer.device = th.device("meta")
    restored = read_rollouts(tmp_path / "queue", Step(8, 2), {"queue": StaleRollouts(1)}, buffer)["queue"]
    assert restored.waiting[0].buffer.device.type == "meta"


def test_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "queue.pkl"
    write_rollouts(path, Step(16, 2), {"queue": filled_queue(1)})

    class Interrupted(StaleRollouts):
        def pieces(self):
            if self.has_begun:
                raise KeyboardInterrupt
            self.has_begun = True
            return super().pieces()

    queue = Interrupted(1)
    queue.has_begun = False
    with pytest.raises(KeyboardInterrupt):
        write_rollouts(path, Step(16, 2), {"queue": queue})
    assert list(tmp_path.iterdir()) == [path]
    assert read_queue(path, 1).waiting[0].buffer.rewards[0, 0] == 1.0


def test_files_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "queue.pkl"
    write_rollouts(path, Step(16, 2), {"queue": filled_queue(2)})
    with pytest.raises(ValueError, match="num_timesteps=16 and 2 rollouts, the model is at 24 and 2"):
        read_queue(path, 2, num_timesteps=24)
    with pytest.raises(ValueError, match="staleness=1 allows fewer"):
        read_queue(path, 1)
    with pytest.raises(ValueError, match=r"\(4, 2\), the model expects \(4, 3\)"):
        read_queue(path, 2, n_envs=3)
    with pytest.raises(ValueError, match=r"has \['queue'\], the model keeps \['phase', 'queue'\]"):
        read_rollouts(path, Step(16, 2), {"queue": StaleRollouts(2), "phase": PhaseBuffer(2)}, make_rollout().buffer)


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "queue.pkl"
    write_rollouts(path, Step(16, 2), {"queue": filled_queue(2)})
    whole = path.read_bytes()
    generator = random.Random(0)
    places = [*range(0, 400, 5), *(generator.randrange(len(whole)) for _ in range(60))]
    for place in places:
        changed = bytearray(whole)
        changed[place] ^= 1 << generator.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=r"queue\.pkl: (damaged|not a file)"):
            read_queue(path, 2)
    for length in (*range(0, 400, 19), len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"queue\.pkl: (damaged or cut off|not a file)"):
            read_queue(path, 2)
    path.write_bytes(whole + b"x")
    with pytest.raises(ValueError, match=r"queue\.pkl: damaged, there is more behind its end"):
        read_queue(path, 2)


def test_pickles_are_not_read(tmp_path):
    path, touched = tmp_path / "queue.pkl", tmp_path / "touched"

    class Hostile:
        def __reduce__(self):
            return touched.touch, ()

    path.write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(ValueError, match=r"queue\.pkl: not a file of save_replay_buffer\(\) but a pickle"):
        read_queue(path, 2)
    write_rollouts(path, Step(16, 2), {"queue": filled_queue(1)})
    whole = path.read_bytes()
    header = io.BytesIO()
    np.save(header, np.array([Hostile()]), allow_pickle=True)
    start = whole.index(b"\x93NUMPY")
    path.write_bytes(whole[:start] + header.getvalue() + whole[start:])
    with pytest.raises(ValueError, match=r"queue\.pkl: damaged .*Object arrays cannot be loaded"):
        read_queue(path, 2)
    assert not touched.exists()


def test_files_of_other_runs_are_refused(tmp_path):
    path = tmp_path / "queue.pkl"
    run = {"algorithm": "PPOEWMA", "gamma": 0.99, "n_steps": 4, "n_envs": 2}
    write_rollouts(path, Step(16, 2), {"queue": filled_queue(1)}, run=run)

    def read(**changes):
        return read_rollouts(
            path, Step(16, 2), {"queue": StaleRollouts(1)}, make_rollout().buffer, run={**run, **changes}
        )

    assert len(read()["queue"]) == 1
    with pytest.raises(ValueError, match=r"queue\.pkl: has returns of gamma=0\.99, the model has 0\.9"):
        read(gamma=0.9)
    with pytest.raises(ValueError, match=r"belongs to another run, algorithm is 'PPOEWMA' there and 'PPG' in"):
        read(algorithm="PPG", n_envs=3)
    with pytest.raises(OtherSizeError, match=r"'n_envs': 2}, the model expects .*'n_envs': 3"):
        read(n_envs=3)


def test_what_a_file_cannot_have_is_named(tmp_path):
    queue = filled_queue(1)
    queue.waiting[0].buffer.notes = ["of the user"]
    with pytest.raises(TypeError, match=r"RolloutBuffer\.notes is a list.*make it an array"):
        write_rollouts(tmp_path / "queue", Step(16, 2), {"queue": queue})
    assert list(tmp_path.iterdir()) == []


def phase_buffer(n_rollouts: int, n_stored: int) -> PhaseBuffer:
    """Returns are 100·iteration + 10·step + environment; the first observation entry is the same."""
    phase = PhaseBuffer(n_rollouts)
    for iteration in range(n_stored):
        buffer = make_rollout().buffer
        numbers = 100 * iteration + 10 * np.arange(4)[:, None] + np.arange(2)
        buffer.returns[:] = numbers
        buffer.observations[..., 0] = numbers
        phase.add(buffer)
        buffer.returns[:] = -1.0  # the next collection
    return phase


EVERY_SAMPLE = sorted(100 * i + 10 * t + e for i in range(3) for t in range(4) for e in range(2))


def test_phase_visits_every_sample_once_and_mixes_iterations_and_environments():
    np.random.seed(0)
    phase = phase_buffer(3, 3)
    assert phase.is_full
    orders = []
    for _ in range(2):
        minibatches = [phase.returns(indices, th.device("cpu")) for indices in phase.minibatches(7)]
        assert [len(minibatch) for minibatch in minibatches] == [7, 7, 7, 3]
        orders.append(th.cat(minibatches).tolist())
        assert sorted(orders[-1]) == EVERY_SAMPLE
        assert len({int(value) // 100 for value in minibatches[0].tolist()}) > 1
        assert len({int(value) % 10 for value in minibatches[0].tolist()}) > 1
    assert orders[0] != orders[1]


def test_phase_keeps_observations_with_their_targets():
    phase = phase_buffer(3, 2)
    for indices in phase.minibatches(5):
        observations = phase.observations(indices, th.device("cpu"))
        assert observations[:, 0].tolist() == phase.returns(indices, th.device("cpu")).tolist()


def test_phase_stores_flattened_rollouts_too():
    buffer, phase = make_rollout().buffer, PhaseBuffer(1)
    numbers = 10 * np.arange(4)[:, None] + np.arange(2)
    buffer.returns[:], buffer.observations[..., 0] = numbers, numbers
    list(buffer.get())  # flattens
    phase.add(buffer)
    every = slice(None)
    returns = phase.returns(every, th.device("cpu"))
    assert sorted(returns.tolist()) == sorted(numbers.ravel())
    assert phase.observations(every, th.device("cpu"))[:, 0].tolist() == returns.tolist()


def test_phase_keeps_the_dtype_of_observations_in_one_block():
    space = spaces.Dict({"image": spaces.Box(0, 255, (3, 8, 8), np.uint8), "returns": OBSERVATIONS})
    buffer, phase = DictRolloutBuffer(4, space, spaces.Discrete(2), "cpu", n_envs=2), PhaseBuffer(5)
    assert phase.nbytes == 0
    buffer.observations["image"][:] = 7
    phase.add(buffer)
    assert phase.nbytes == 5 * 8 * (3 * 8 * 8 + 2 * 4 + 4)
    observations = phase.observations(np.array([1, 3]), th.device("cpu"))
    assert observations["image"].dtype == th.uint8
    assert observations["image"].shape == (2, 3, 8, 8)
    assert int(observations["image"].min()) == 7
    assert observations["returns"].shape == (2, 2)
    phase.clear()
    assert len(phase) == 0
    assert phase.nbytes == 5 * 8 * (3 * 8 * 8 + 2 * 4 + 4)


def test_phase_survives_a_file():
    file = io.BytesIO()
    write_rollouts(file, Step(16, 2), {"queue": filled_queue(1), "phase": phase_buffer(3, 2)})
    file.seek(0)
    parts = {"queue": StaleRollouts(1), "phase": PhaseBuffer(3)}
    restored = read_rollouts(file, Step(16, 2), parts, make_rollout().buffer)["phase"]
    assert len(restored) == 2
    returns = restored.returns(slice(None), th.device("cpu"))
    assert sorted(returns.tolist()) == EVERY_SAMPLE[:16]
    assert len(parts["phase"]) == 0


def test_a_large_phase_is_never_in_memory_twice(tmp_path):
    n_steps, n_rollouts = 500, 8
    space = spaces.Box(-1, 1, (1000,))
    phase = PhaseBuffer(n_rollouts + 1)
    buffer = RolloutBuffer(n_steps, space, spaces.Discrete(2), "cpu")
    buffer.observations[:] = np.arange(1000)
    for _ in range(n_rollouts):
        phase.add(buffer)
    of_a_rollout = phase.nbytes / (n_rollouts + 1)
    tracemalloc.start()
    write_rollouts(tmp_path / "phase", Step(1, 1), {"phase": phase})
    assert tracemalloc.get_traced_memory()[1] < 1.5 * of_a_rollout
    tracemalloc.reset_peak()
    restored = read_rollouts(tmp_path / "phase", Step(1, 1), {"phase": PhaseBuffer(n_rollouts + 1)}, buffer)["phase"]
    assert tracemalloc.get_traced_memory()[1] < phase.nbytes + 2.5 * of_a_rollout
    tracemalloc.stop()
    assert np.array_equal(*(each.observations(slice(None), th.device("cpu")) for each in (restored, phase)))


def test_phases_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "phase"
    write_rollouts(path, Step(16, 2), {"phase": phase_buffer(3, 2)})
    with pytest.raises(ValueError, match="has 2 rollouts of a phase, n_policy_iterations=2 allows fewer"):
        read_rollouts(path, Step(16, 2), {"phase": PhaseBuffer(2)}, make_rollout().buffer)
    with pytest.raises(ValueError, match="a model with n_steps=5, n_envs=2 and its observation space expects"):
        read_rollouts(path, Step(16, 2), {"phase": PhaseBuffer(3)}, make_rollout(n_steps=5).buffer)
    phase = phase_buffer(3, 1)
    with pytest.raises(ValueError, match="this phase stores"):
        phase.add(make_rollout(n_envs=1).buffer)
    with pytest.raises(ValueError, match="n_policy_iterations=2 rollouts are stored already"):
        phase_buffer(2, 3)


def test_phase_that_cannot_fit_is_refused_before_it_is_reserved(monkeypatch):
    # 3 rollouts of 8 samples of two float32 observations and one float32 target are 288 bytes.
    buffer = make_rollout().buffer
    monkeypatch.setattr("sb3_ppo_ewma.rollouts.available_memory", lambda: 288)
    PhaseBuffer(3).check_memory(buffer)
    monkeypatch.setattr("sb3_ppo_ewma.rollouts.available_memory", lambda: 287)
    with pytest.raises(ValueError, match=r"n_policy_iterations=3 rollouts of n_steps=4 and n_envs=2 are 24 samples"):
        PhaseBuffer(3).check_memory(buffer)
    phase_buffer(3, 1).check_memory(buffer)  # reserved already
    monkeypatch.setattr("sb3_ppo_ewma.rollouts.available_memory", lambda: None)
    PhaseBuffer(3).check_memory(buffer)


def test_recomputed_advantages():
    # One environment, γ = ½, λ = 1, rewards 1, values 0, and the last value 8: returns 1 + ½(1 + ½·8) = 3.5 and 5
    buffer = RolloutBuffer(2, OBSERVATIONS, spaces.Discrete(2), "cpu", gae_lambda=1.0, gamma=0.5)
    buffer.rewards[:] = 1.0
    buffer.full = True
    rollout = Rollout(buffer, np.zeros((1, 2)), np.zeros(1, dtype=bool))
    list(buffer.get())
    rollout.replace_values(np.zeros(2, dtype=np.float32), th.tensor([8.0]))
    assert buffer.returns.ravel().tolist() == [3.5, 5.0]
    rollout.replace_values(np.array([1.0, 2.0], dtype=np.float32), th.tensor([8.0]))
    assert buffer.returns.ravel().tolist() == [3.5, 5.0]
    assert buffer.advantages.ravel().tolist() == [2.5, 3.0]
    assert buffer.values.ravel().tolist() == [0.0, 0.0]  # value clipping still refers to those of the collection


QUANTITIES = {"rewards": "environment", "values": "network", "log_probs": "network", "advantages": "overflow"}


@pytest.mark.parametrize("name", QUANTITIES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_inf_are_named(name, bad):
    rollout = make_rollout()
    rollout.check_finite()
    getattr(rollout.buffer, name).flat[3] = bad
    words = name.replace("log_probs", "log-probabilities")
    with pytest.raises(ValueError, match=f"NaN or Inf in {words} of the rollout, from .*{QUANTITIES[name]}"):
        rollout.check_finite()


def test_nan_in_observations_is_named_only_where_it_reaches_the_losses():
    rollout = make_rollout()
    rollout.buffer.observations.flat[3] = np.nan
    rollout.last_obs[0, 0] = np.inf
    rollout.check_finite()
    rollout.buffer.values.flat[3] = np.nan
    with pytest.raises(ValueError, match="NaN or Inf in observations of the rollout, from the environment"):
        rollout.check_finite()
    rollout.buffer.observations[:] = 0.0
    with pytest.raises(ValueError, match="NaN or Inf in the last observation of the rollout, from the environment"):
        rollout.check_finite()


def test_finite_checks_look_into_dictionaries_and_skip_integers():
    assert is_finite({"image": np.zeros(3, dtype=np.uint8), "vector": np.zeros(2)})
    assert not is_finite({"image": np.zeros(3, dtype=np.uint8), "vector": np.array([0.0, np.nan])})
    assert not is_finite(np.array([1.0, -np.inf], dtype=np.float16))


# === Minibatches ===

ACTIONS = {
    "discrete": spaces.Discrete(3),
    "multidiscrete": spaces.MultiDiscrete([3, 2]),
    "multibinary": spaces.MultiBinary(2),
    "box": spaces.Box(-1, 1, (2,), np.float64),
}
DICTIONARY = spaces.Dict({"image": spaces.Box(0, 255, (3, 4, 4), np.uint8), "vector": OBSERVATIONS})


def random_buffer(actions: str = "discrete", is_dict: bool = False) -> RolloutBuffer:
    """:return: filled with random numbers, 12 samples"""
    cls, space = (DictRolloutBuffer, DICTIONARY) if is_dict else (RolloutBuffer, OBSERVATIONS)
    buffer = cls(4, space, ACTIONS[actions], "cpu", n_envs=3)
    space.seed(0)
    ACTIONS[actions].seed(0)
    np.random.seed(0)
    for _ in range(4):
        obs = [space.sample() for _ in range(3)]
        stacked = {key: np.stack([each[key] for each in obs]) for key in space} if is_dict else np.stack(obs)
        action = np.stack([ACTIONS[actions].sample() for _ in range(3)])
        numbers = th.as_tensor(np.random.randn(2, 3))
        buffer.add(stacked, action, np.random.randn(3), np.random.rand(3) < 0.3, *numbers)
    buffer.compute_returns_and_advantage(th.ones(3), np.zeros(3, dtype=bool))
    return buffer


def assert_same_samples(first, second):
    for one, other in zip(first, second, strict=True):
        pairs = [(one[key], other[key]) for key in one] if isinstance(one, dict) else [(one, other)]
        for a, b in pairs:
            assert th.equal(a, b)


@pytest.mark.parametrize("is_dict", [False, True])
@pytest.mark.parametrize("actions", ACTIONS)
@pytest.mark.parametrize("batch_size", [4, 5, 50, None])
def test_minibatches_on_the_device_are_those_of_the_buffer(actions, is_dict, batch_size):
    samples_class = DictRolloutBufferSamples if is_dict else RolloutBufferSamples
    own = DeviceMinibatches(random_buffer(actions, is_dict), samples_class)
    buffer = random_buffer(actions, is_dict)
    for _ in range(2):  # epochs
        state = np.random.get_state()
        expected = list(buffer.get(batch_size))
        after = np.random.get_state()[1]
        np.random.set_state(state)
        minibatches = list(own.minibatches(batch_size))
        assert np.array_equal(np.random.get_state()[1], after)
        assert [len(each.returns) for each in minibatches] == [len(each.returns) for each in expected]
        for minibatch, other in zip(minibatches, expected, strict=True):
            assert type(minibatch) is samples_class
            dtype = th.int64 if actions == "discrete" else th.float32
            assert minibatch.actions.dtype == dtype
            flat = other.actions.long().flatten() if actions == "discrete" else other.actions
            assert_same_samples(minibatch, other._replace(actions=flat))


@pytest.mark.parametrize(
    ("batch_size", "expected"), [(4, [(12, 3)]), (5, [(10, 2), (2, 1)]), (50, [(12, 1)]), (None, [(12, 1)])]
)
def test_blocks_have_the_samples_of_several_minibatches(batch_size, expected):
    own = DeviceMinibatches(random_buffer(), RolloutBufferSamples)
    np.random.seed(1)
    minibatches = list(own.minibatches(batch_size))
    np.random.seed(1)
    blocks = list(own.blocks(batch_size, features_dim=2))
    assert [(len(samples.returns), n) for samples, n in blocks] == expected
    joined = [th.cat([getattr(each, name) for each in minibatches]) for name in RolloutBufferSamples._fields]
    assert_same_samples([th.cat([samples[i] for samples, _ in blocks]) for i in range(6)], joined)


def test_blocks_have_at_least_one_minibatch():
    own = DeviceMinibatches(random_buffer(), RolloutBufferSamples)
    blocks = own.blocks(4, features_dim=2**30)
    assert [(len(samples.returns), n) for samples, n in blocks] == [(4, 1)] * 3


def test_minibatches_of_the_buffer_itself():
    own = BufferMinibatches(random_buffer())
    assert [len(samples.returns) for samples in own.minibatches(5)] == [5, 5, 2]


@pytest.mark.parametrize("is_on_device", [False, True])
def test_changed_targets_reach_the_minibatches(is_on_device):
    buffer = random_buffer()
    own = DeviceMinibatches(buffer, RolloutBufferSamples) if is_on_device else BufferMinibatches(buffer)
    (before,) = own.minibatches(None)
    buffer.advantages = np.arange(12, dtype=np.float32)
    buffer.returns = buffer.advantages + 100
    own.update_targets()
    (after,) = own.minibatches(None)
    assert sorted(after.advantages.tolist()) == list(range(12))
    assert th.equal(after.returns, after.advantages + 100)
    assert sorted(after.old_values.tolist()) == sorted(before.old_values.tolist())


def test_rollouts_that_do_not_fit_on_the_device_come_from_the_buffer(monkeypatch):
    def no_memory(*args, **kwargs):
        raise th.OutOfMemoryError

    buffer = random_buffer()
    assert isinstance(device_minibatches(buffer, RolloutBufferSamples), DeviceMinibatches)
    monkeypatch.setattr("sb3_ppo_ewma.rollouts.DeviceMinibatches", no_memory)
    with pytest.warns(UserWarning, match="A rollout of n_steps=4 and n_envs=3 does not fit into the memory of cpu"):
        source = device_minibatches(buffer, RolloutBufferSamples)
    assert isinstance(source, BufferMinibatches)
