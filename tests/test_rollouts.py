import pickle

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer

from sb3_ppo_ewma.rollouts import Rollout, StaleRollouts, is_finite

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


def test_queue_survives_a_file(tmp_path):
    queue = StaleRollouts(2)
    for k in range(2):
        queue.exchange(make_rollout(float(k + 1)))
    queue.save(tmp_path / "new_folder" / "queue", num_timesteps=16)
    assert [path.name for path in (tmp_path / "new_folder").iterdir()] == ["queue.pkl"]
    restored = StaleRollouts(2)
    restored.load(tmp_path / "new_folder" / "queue", make_rollout().buffer, num_timesteps=16)
    assert restored.missing == 0
    assert restored.exchange(make_rollout()).buffer.rewards[0, 0] == 1.0


def test_restored_rollouts_are_on_the_device_of_the_model(tmp_path):
    queue, restored, buffer = StaleRollouts(1), StaleRollouts(1), make_rollout().buffer
    queue.exchange(make_rollout())
    queue.save(tmp_path / "queue", num_timesteps=8)
    buffer.device = th.device("meta")
    restored.load(tmp_path / "queue", buffer, num_timesteps=8)
    assert restored.waiting[0].buffer.device.type == "meta"


def test_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    queue = StaleRollouts(1)
    queue.exchange(make_rollout(3.0))
    queue.save(tmp_path / "queue.pkl", num_timesteps=8)

    def interrupted(content, file, protocol):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("sb3_ppo_ewma.rollouts.pickle.dump", interrupted)
    with pytest.raises(KeyboardInterrupt):
        queue.save(tmp_path / "queue.pkl", num_timesteps=8)
    restored = StaleRollouts(1)
    restored.load(tmp_path / "queue.pkl", make_rollout().buffer, num_timesteps=8)
    assert restored.waiting[0].buffer.rewards[0, 0] == 3.0


def test_files_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "queue.pkl"
    queue = StaleRollouts(2)
    queue.exchange(make_rollout())
    queue.exchange(make_rollout())
    queue.save(path, num_timesteps=16)
    with pytest.raises(ValueError, match="num_timesteps=16, the model is at 24"):
        StaleRollouts(2).load(path, make_rollout().buffer, num_timesteps=24)
    with pytest.raises(ValueError, match="staleness=1 allows fewer"):
        StaleRollouts(1).load(path, make_rollout().buffer, num_timesteps=16)
    with pytest.raises(ValueError, match=r"\(4, 2\), the model expects \(4, 3\)"):
        StaleRollouts(2).load(path, make_rollout(n_envs=3).buffer, num_timesteps=16)
    path.write_bytes(pickle.dumps({"not": "a queue"}))
    with pytest.raises(ValueError, match="not a queue of waiting rollouts"):
        StaleRollouts(2).load(path, make_rollout().buffer, num_timesteps=16)


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


@pytest.mark.parametrize("name", ["observations", "rewards", "values", "log_probs", "advantages"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_inf_are_named(name, bad):
    rollout = make_rollout()
    rollout.check_finite()
    getattr(rollout.buffer, name).flat[3] = bad
    with pytest.raises(ValueError, match=f"NaN or Inf in {name.replace('log_probs', 'log-probabilities')}"):
        rollout.check_finite()


def test_finite_checks_look_into_dictionaries_and_skip_integers():
    assert is_finite({"image": np.zeros(3, dtype=np.uint8), "vector": np.zeros(2)})
    assert not is_finite({"image": np.zeros(3, dtype=np.uint8), "vector": np.array([0.0, np.nan])})
