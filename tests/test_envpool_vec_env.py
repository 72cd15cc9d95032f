"""
EnvPool's environments as a vectorised environment of SB3: against EnvPool's own interface, against Gymnasium's
environments, and in training.
"""

import gc
import os
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor, load_results
from stable_baselines3.common.vec_env import VecEnv, VecMonitor, VecNormalize, VecTransposeImage

from sb3_ppo_ewma import PPOEWMA
from sb3_ppo_ewma.envs.envpool_vec_env import EnvPoolVecEnv, make_envpool_vec_env

pytestmark = pytest.mark.long

envpool = pytest.importorskip("envpool")


def procgen_runs() -> bool:
    try:
        envpool.make_spec("CoinrunEasy-v0")
    except ImportError:  # the system's Qt 5 is missing
        return False
    return True


needs_procgen = pytest.mark.skipif(not procgen_runs(), reason="Procgen in EnvPool needs Qt 5")


def raw_pool(task_id: str, **options: Any) -> Any:
    """
    :return: EnvPool itself, without its warning about the bounds of spaces
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pool = envpool.make_gymnasium(task_id, **options)
        _ = pool.observation_space
    return pool


def rows(observations: Any, index: int) -> Any:
    if isinstance(observations, dict):
        return {name: values[index].copy() for name, values in observations.items()}
    return observations[index].copy()


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)
    return np.array_equal(one, other)


# Short episodes that end all the time, and what is special: dicts, whole numbers, frames, Atari's lives
@pytest.mark.parametrize(
    ("task_id", "n_episodes", "options"),
    [
        ("CartPole-v1", 1000, {}),
        ("Pendulum-v1", 16, {}),
        ("Taxi-v3", 16, {}),
        ("MiniGrid-Empty-5x5-v0", 40, {"max_episode_steps": 30}),
        ("Breakout-v5", 60, {"episodic_life": True, "reward_clip": True}),
        pytest.param("CoinrunEasy-v0", 16, {}, marks=needs_procgen),
    ],
)
def test_everything_equals_the_raw_interface(task_id: str, n_episodes: int, options: dict[str, Any]) -> None:
    n_envs = 8
    env = make_envpool_vec_env(task_id, n_envs, seed=11, **options)
    # Each environment of the raw interface alone, which resets in a step of its own, whose action it ignores
    raw = [raw_pool(task_id, num_envs=1, seed=[11 + i], **options) for i in range(n_envs)]
    observations = env.reset()
    for i, pool in enumerate(raw):
        assert equal(rows(pool.reset()[0], 0), rows(observations, i))
    env.action_space.seed(0)
    n_ends = n_steps = 0
    lengths: list[int] = []
    while n_ends < n_episodes:
        actions = np.array([env.action_space.sample() for _ in range(n_envs)])
        observations, rewards, dones, infos = env.step(actions)
        n_steps += n_envs
        for i, pool in enumerate(raw):
            expected, reward, terminated, truncated, info = pool.step(actions[i : i + 1])
            assert reward[0] == rewards[i]
            assert (terminated[0] or truncated[0]) == dones[i]
            assert infos[i]["TimeLimit.truncated"] == (truncated[0] and not terminated[0])
            assert infos[i]["elapsed_step"] == info["elapsed_step"][0]
            assert ("terminal_observation" in infos[i]) == dones[i]
            if dones[i]:
                assert equal(infos[i]["terminal_observation"], rows(expected, 0))
                expected, reward, terminated, truncated, info = pool.step(actions[i : i + 1])  # only resets
                assert reward[0] == 0
                assert not terminated[0]
                assert not truncated[0]
                assert env.reset_infos[i]["elapsed_step"] == info["elapsed_step"][0]
                n_ends += 1
            if "episode" in infos[i]:
                lengths.append(infos[i]["episode"]["l"])
            assert equal(rows(observations, i), rows(expected, 0))
    # No action was swallowed: all of them lie in episodes.
    assert sum(lengths) + env._lengths.sum() == n_steps
    assert lengths
    env.close()


# EnvPool ends episodes at the limit in the first three, and ignores it in the others.
@pytest.mark.parametrize(
    "task_id",
    [
        "CartPole-v1",
        "Taxi-v3",
        "MiniGrid-Empty-5x5-v0",
        "Catch-v0",
        "CliffWalking-v1",
        "Game2048-v1",
        "LaneKeeping-v0",
        pytest.param("HeistEasy-v0", marks=needs_procgen),
    ],
)
def test_the_limit_ends_episodes_in_every_family(task_id: str) -> None:
    env = make_envpool_vec_env(task_id, 3, seed=0, max_episode_steps=5)
    env.reset()
    env.action_space.seed(0)
    lengths = []
    for _ in range(11):
        _, _, dones, infos = env.step(np.array([env.action_space.sample() for _ in range(3)]))
        for i in np.flatnonzero(dones):
            assert infos[i]["TimeLimit.truncated"] == (infos[i]["elapsed_step"] == 5)
            assert "terminal_observation" in infos[i]
            assert env.reset_infos[i]["elapsed_step"] == 0
            lengths.append(infos[i]["episode"]["l"])
    assert lengths.count(5) >= 3
    assert max(lengths) == 5
    env.close()


def test_an_end_of_the_game_is_none_of_the_limit() -> None:
    # Catch ends after 9 steps. EnvPool counts that as a truncation, since it is after the limit.
    pool = raw_pool("Catch-v0", num_envs=1, max_episode_steps=5)
    pool.reset()
    truncated = [bool(pool.step(np.array([1]))[3][0]) for _ in range(9)]
    assert truncated == [False] * 8 + [True], "EnvPool works now"
    env = make_envpool_vec_env("Catch-v0", 1, max_episode_steps=20)
    env.reset()
    ends = [env.step(np.array([1]))[2:] for _ in range(9)]
    assert [bool(dones[0]) for dones, _ in ends] == [False] * 8 + [True]
    assert ends[-1][1][0]["TimeLimit.truncated"] is False


def test_a_level_with_its_own_limit_ends_truly_when_it_is_solved() -> None:
    env = make_envpool_vec_env("BabyAI-GoToRedBallNoDists-v0", 8, seed=0)
    assert env.spec.max_episode_steps is None
    env.reset()
    env.action_space.seed(0)
    ends: dict[bool, list[bool]] = {True: [], False: []}
    while not (ends[True] and ends[False]):
        actions = np.array([0 if i < 4 else env.action_space.sample() for i in range(8)])  # half of them only turn
        _, rewards, dones, infos = env.step(actions)
        for i in np.flatnonzero(dones):
            ends[bool(rewards[i] > 0)].append(infos[i]["TimeLimit.truncated"])
    assert not any(ends[True])
    assert all(ends[False])


@pytest.mark.parametrize("task_id", ["CartPole-v1", "Pendulum-v1", "Acrobot-v1", "MountainCar-v0"])
def test_spaces_are_those_of_gymnasium(task_id: str) -> None:
    env = make_envpool_vec_env(task_id)
    reference = gym.make(task_id)
    assert env.observation_space == reference.observation_space
    assert env.action_space == reference.action_space
    assert env.get_attr("spec")[0].max_episode_steps == reference.spec.max_episode_steps  # type: ignore[union-attr]


def test_actions_of_mujoco_are_those_of_gymnasium() -> None:
    reference = gym.make("HalfCheetah-v5")
    env = make_envpool_vec_env("HalfCheetah-v5")
    assert env.action_space == reference.action_space
    assert env.observation_space == reference.observation_space


def test_vectors_of_whole_numbers_are_multi_discrete() -> None:
    assert make_envpool_vec_env("Sudoku-v0").action_space == gym.spaces.MultiDiscrete([9, 9, 9])


def fixed_policy(task_id: str, observations: np.ndarray) -> np.ndarray:
    if task_id == "CartPole-v1":
        # Too weak a hold on the place for 500 steps, strong enough for some hundred
        return (observations @ [0.0, 0.1, 1.0, 0.3] > 0).astype(np.int64)
    cos, sin, velocity = observations.T
    return np.clip(-2 * np.arctan2(sin, cos) - velocity, -2, 2)[:, None].astype(np.float32)


@pytest.mark.parametrize("task_id", ["CartPole-v1", "Pendulum-v1"])
def test_returns_of_a_fixed_policy_agree_with_gymnasium(task_id: str) -> None:
    env = make_envpool_vec_env(task_id, 10, seed=0)
    observations = env.reset()
    returns: list[float] = []
    while len(returns) < 200:
        observations, _, _, infos = env.step(fixed_policy(task_id, observations))
        returns += [info["episode"]["r"] for info in infos if "episode" in info]
    reference = gym.make(task_id)
    expected = []
    for seed in range(200):
        observation, _ = reference.reset(seed=seed)
        total, over = 0.0, False
        while not over:
            action = fixed_policy(task_id, observation[None])[0]
            observation, reward, terminated, truncated, _ = reference.step(action)
            total, over = total + float(reward), terminated or truncated
        expected.append(total)
    # Five standard errors of the difference
    tolerance = 5 * np.sqrt((np.var(returns) + np.var(expected)) / 200)
    assert np.mean(returns) == pytest.approx(np.mean(expected), abs=tolerance)
    assert tolerance < abs(np.mean(expected)) / 2


def test_steps_are_those_of_gymnasium() -> None:
    env = make_envpool_vec_env("Pendulum-v1", 1, seed=3)
    observation = env.reset()[0]
    reference = gym.make("Pendulum-v1").unwrapped
    reference.reset()
    reference.state = np.array([np.arctan2(observation[1], observation[0]), observation[2]])  # type: ignore[attr-defined]
    env.action_space.seed(0)
    for _ in range(100):
        action = env.action_space.sample()
        expected, expected_reward, *_ = reference.step(action)
        observations, rewards, *_ = env.step(action[None])
        np.testing.assert_allclose(observations[0], expected, atol=2e-3)
        assert rewards[0] == pytest.approx(float(expected_reward), abs=2e-3)


def test_seeds_decide_and_a_reset_without_one_goes_on() -> None:
    def first(env: EnvPoolVecEnv) -> np.ndarray:
        return np.array(env.reset())

    env, same, other = (make_envpool_vec_env("CartPole-v1", 3, seed=seed) for seed in (1, 1, 2))
    start = first(env)
    assert np.array_equal(start, first(same))
    # The second environment has the next seed.
    assert np.array_equal(start[1:], first(other)[:2])
    assert not np.array_equal(start, first(env))
    assert env.seed(1) == [1, 2, 3]
    assert np.array_equal(start, first(env))
    unseeded = make_envpool_vec_env("CartPole-v1", 3), make_envpool_vec_env("CartPole-v1", 3)
    assert not np.array_equal(first(unseeded[0]), first(unseeded[1]))
    # SB3 draws from numbers up to 2³² − 1, EnvPool takes those below 2³¹.
    assert env.seed(2**31 + 4) == [4, 5, 6]


def test_a_seed_of_the_algorithm_makes_training_repeatable() -> None:
    def parameters() -> np.ndarray:
        env = make_envpool_vec_env("CartPole-v1", 4)
        model = PPOEWMA("MlpPolicy", env, n_steps=32, batch_size=32, n_epochs=2, seed=5).learn(256)
        return np.concatenate([each.detach().numpy().ravel() for each in model.policy.parameters()])

    assert np.array_equal(parameters(), parameters())


def test_arrays_that_were_returned_stay_as_they_are() -> None:
    env = make_envpool_vec_env("CartPole-v1", 4, seed=0)
    kept = [env.reset()]
    copies = [kept[0].copy()]
    for _ in range(300):
        observations, rewards, dones, _ = env.step(np.random.randint(2, size=4))
        kept += [observations, rewards, dones]
        copies += [observations.copy(), rewards.copy(), dones.copy()]
    assert all(np.array_equal(one, other) for one, other in zip(kept, copies, strict=True))


def test_statistics_are_those_of_sb3s_monitor(tmp_path: Path) -> None:
    env = make_envpool_vec_env(
        "CartPole-v1", 2, seed=0, monitor_dir=str(tmp_path / "ours"), info_keywords=["elapsed_step"]
    )
    with pytest.warns(UserWarning, match="already wrapped with a `Monitor`"):
        theirs = VecMonitor(make_envpool_vec_env("CartPole-v1", 2, seed=0), str(tmp_path / "theirs"))
    env.reset()
    theirs.reset()
    for _ in range(100):
        actions = np.random.randint(2, size=2)
        _, _, dones, infos = env.step(actions)
        _, _, _, expected = theirs.step(actions)
        for i in np.flatnonzero(dones):
            assert infos[i]["episode"]["r"] == expected[i]["episode"]["r"]
            assert infos[i]["episode"]["l"] == expected[i]["episode"]["l"]
    env.close()
    results = load_results(str(tmp_path / "ours"))
    assert [path.name for path in (tmp_path / "ours").iterdir()] == ["0.monitor.csv"]
    assert len(results) > 2
    assert (results.r == results.l).all()
    assert (results.elapsed_step == results.l).all()
    assert results.t.is_monotonic_increasing
    assert env.env_is_wrapped(Monitor) == [True, True]


def test_an_episode_of_atari_is_a_game() -> None:
    options = {"repeat_action_probability": 0.0, "max_episode_steps": 2000}
    env = make_envpool_vec_env("Breakout-v5", 4, seed=0, episodic_life=True, reward_clip=True, **options)
    env.reset()
    env.action_space.seed(0)
    games = []
    raw_returns = np.zeros(4)
    lost = np.zeros(4, dtype=int)
    while len(games) < 8:
        _, rewards, dones, infos = env.step(np.array([env.action_space.sample() for _ in range(4)]))
        assert np.isin(rewards, [0, 1]).all()
        raw_returns += [info["reward"] for info in infos]
        lost += dones
        for i in np.flatnonzero(dones):
            assert ("episode" in infos[i]) == (infos[i]["lives"] == 0)
            if "episode" in infos[i]:
                assert infos[i]["episode"]["r"] == raw_returns[i]
                assert lost[i] == 5
                games.append(infos[i]["episode"])
                raw_returns[i] = lost[i] = 0
    assert max(game["l"] for game in games) > 100


def test_trains_evaluates_and_loads(tmp_path: Path) -> None:
    env = VecNormalize(make_envpool_vec_env("Pendulum-v1", 4, seed=0))
    model = PPOEWMA("MlpPolicy", env, n_steps=64, batch_size=64, n_epochs=1, seed=0).learn(4 * 256)
    # Four episodes of 200 steps have ended.
    assert [episode["l"] for episode in model.ep_info_buffer] == [200] * 4  # type: ignore[union-attr]
    model.save(tmp_path / "model")
    loaded = PPOEWMA.load(tmp_path / "model", env=make_envpool_vec_env("Pendulum-v1", 2, seed=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # SB3's of an environment without Monitor among them
        returns, lengths = evaluate_policy(loaded, loaded.get_env(), 3, return_episode_rewards=True)
    assert lengths == [200] * 3
    assert all(-2000 < each < 0 for each in returns)  # type: ignore[union-attr]


@needs_procgen
def test_images_are_taken_as_they_are() -> None:
    env = make_envpool_vec_env("CoinrunEasy-v0", 2, seed=0)
    model = PPO("CnnPolicy", env, n_steps=8, batch_size=8, n_epochs=1).learn(16)
    assert not isinstance(model.get_env(), VecTransposeImage)


@needs_procgen
def test_renders(recwarn: pytest.WarningsRecorder) -> None:
    env = make_envpool_vec_env("CoinrunEasy-v0", 2, seed=0, render_mode="rgb_array", render_width=96, render_height=64)
    with pytest.raises(RuntimeError, match="before the first reset"):
        env.render()
    env.reset()
    images = env.get_images()
    assert [image.shape for image in images if image is not None] == [(64, 96, 3)] * 2
    assert not np.array_equal(images[0], images[1])
    assert np.array_equal(env.env_method("render", indices=1)[0], images[1])
    assert env.render().shape == (128, 96, 3)  # type: ignore[union-attr]
    assert not recwarn.list
    env = make_envpool_vec_env("CartPole-v1", 2)
    with pytest.warns(UserWarning, match="render_mode='rgb_array'"):
        assert env.get_images() == [None, None]


@needs_procgen
def test_a_window_shows_all_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    import cv2

    shown: list[np.ndarray] = []
    monkeypatch.setattr(cv2, "imshow", lambda _, image: shown.append(image))
    monkeypatch.setattr(cv2, "waitKey", lambda _: None)
    env = make_envpool_vec_env("CoinrunEasy-v0", 4, seed=0, render_mode="human")
    env.reset()
    env.render("human")
    env.render()
    assert [image.shape for image in shown] == [(128, 128, 3)] * 2


def test_attributes_and_methods() -> None:
    env = make_envpool_vec_env("CartPole-v1", 3)
    assert env.get_attr("spec", [0, 2])[1].id == "CartPole-v1"
    assert env.get_attr("action_space", 1) == [env.action_space]
    assert env.env_method("get_wrapper_attr", "render_mode") == [None] * 3
    assert not env.has_attr("action_masks")
    with pytest.raises(AttributeError, match="not Python objects and have no attribute 'gravity'"):
        env.get_attr("gravity")
    with pytest.raises(AttributeError, match="'gravity' cannot be set"):
        env.set_attr("gravity", 1.0)
    with pytest.raises(AttributeError, match="no method 'action_masks'"):
        env.env_method("action_masks")
    env.set_options()
    with pytest.raises(ValueError, match="no options at a reset"):
        env.set_options({"low": 0.1})


def test_steps_out_of_order_are_refused() -> None:
    env = make_envpool_vec_env("CartPole-v1", 2, seed=0)
    actions = np.zeros(2, dtype=int)
    with pytest.raises(RuntimeError, match="before the first reset"):
        env.step(actions)
    start = env.reset()
    with pytest.raises(RuntimeError, match="before step_async"):
        env.step_wait()
    env.step_async(actions)
    with pytest.raises(RuntimeError, match="again before step_wait"):
        env.step_async(actions)
    # A step under way is dropped, as SB3 wants it.
    env.seed(0)
    assert np.array_equal(env.reset(), start)


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (np.zeros(3, dtype=int), r"shape \(2,\), got \(3,\)"),
        (np.zeros((2, 1), dtype=int), r"shape \(2,\), got \(2, 1\)"),
        (np.array([0, 2]), r"must lie in Discrete\(2\), got \[0 2\]"),
        (np.array([-1, 0]), r"must lie in Discrete\(2\)"),
    ],
)
def test_actions_that_do_not_belong_to_the_space_are_refused(actions: np.ndarray, message: str) -> None:
    env = make_envpool_vec_env("CartPole-v1", 2)
    env.reset()
    with pytest.raises(ValueError, match=message):
        env.step(actions)
    env.step(np.zeros(2, dtype=int))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task_id": "Breakot-v5"}, "no task 'Breakot-v5'. Similar: Breakout-v5"),
        ({"task_id": "coinrunhard-v0"}, "Similar: CoinrunHard-v0"),
        ({"num_envs": 0}, "num_envs must be >= 1, got 0"),
        ({"render_mode": "ansi"}, "render_mode must be one of 'rgb_array', 'human', None, got 'ansi'"),
        ({"max_episode_step": 3}, "no option 'max_episode_step'. Did you mean 'max_episode_steps'"),
        ({"max_episode_steps": 0}, "max_episode_steps must be >= 1, got 0"),
        ({"batch_size": 1}, "batch_size is not an option here"),
        ({"task_id": "TicTacToe-v1"}, "several players"),
        ({"task_id": "Maze-v0"}, "no dicts within dicts"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EnvPoolVecEnv(**{"task_id": "CartPole-v1", **arguments})


def test_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "envpool", None)
    with pytest.raises(ImportError, match=r"pip install 'sb3-ppo-ewma\[envpool\]'"):
        EnvPoolVecEnv("CartPole-v1")


def n_threads() -> int:
    return len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else threading.active_count()


def test_closing_leaves_no_threads_and_files(tmp_path: Path) -> None:
    def files() -> int:
        return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0

    def once(index: int) -> None:
        env = make_envpool_vec_env("CartPole-v1", 4, monitor_dir=str(tmp_path / str(index)), num_threads=2)
        env.reset()
        env.step_async(np.zeros(4, dtype=int))  # under way
        env.close()
        env.close()

    once(-1)
    gc.collect()
    before = n_threads(), files()
    for index in range(20):
        once(index)
    gc.collect()
    assert (n_threads(), files()) == before


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("make_env", [make_envpool_vec_env, make_vec_env], ids=["EnvPool", "Gymnasium"])
def test_cartpole_is_learned_from_either(make_env: Callable[..., VecEnv], seed: int) -> None:
    env = make_env("CartPole-v1", 8, seed=seed)
    model = PPOEWMA("MlpPolicy", env, n_steps=128, batch_size=256, learning_rate=1e-3, gamma=0.98, seed=seed)
    model.learn(60_000)
    for test_env in (make_envpool_vec_env("CartPole-v1", 4, seed=100), make_vec_env("CartPole-v1", 4, seed=100)):
        mean, _ = evaluate_policy(model, test_env, n_eval_episodes=20)
        assert mean > 475  # of 500
