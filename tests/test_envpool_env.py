"""EnvPool's tasks as single environments of Gymnasium."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from sb3_ppo_ewma import make_envpool_vec_env
from sb3_ppo_ewma.envs.envpool_env import PROCGEN, EnvPoolAtariEnv, EnvPoolEnv
from tests.test_envpool_vec_env import envpool, equal, needs_procgen, rows

pytestmark = pytest.mark.long


@pytest.mark.filterwarnings("ignore:.*Box observation space m")
@pytest.mark.parametrize("task_id", ["CartPole-v1", "MiniGrid-Empty-5x5-v0", "Taxi-v3"])
def test_gymnasium_finds_nothing_to_object_to(task_id: str) -> None:
    check_env(EnvPoolEnv(task_id), skip_render_check=True)


@pytest.mark.parametrize(
    ("task_id", "options"),
    [
        ("CartPole-v1", {}),
        ("MiniGrid-Empty-5x5-v0", {"max_episode_steps": 20}),
        ("Breakout-v5", {"episodic_life": True}),  # a reset goes on with the game
    ],
)
def test_it_steps_as_the_vectorised_one(task_id: str, options: dict[str, object]) -> None:
    single = EnvPoolEnv(task_id, **options)
    together = make_envpool_vec_env(task_id, 1, seed=4, **options)
    observation, info = single.reset(seed=4)
    assert equal(observation, rows(together.reset(), 0))
    assert info["elapsed_step"] == 0
    single.action_space.seed(0)
    n_ends = n_lives_lost = 0
    while n_ends < 6:
        action = single.action_space.sample()
        observation, reward, terminated, truncated, info = single.step(action)
        observations, rewards, dones, infos = together.step(np.array([action]))
        assert reward == rewards[0]
        assert truncated == infos[0]["TimeLimit.truncated"]
        assert (terminated or truncated) == dones[0]
        assert info.keys() == infos[0].keys() - {"TimeLimit.truncated", "episode", "terminal_observation"}
        if dones[0]:
            n_ends += 1
            n_lives_lost += info.get("lives", 0) > 0
            assert equal(observation, infos[0]["terminal_observation"])
            with pytest.raises(RuntimeError, match="call reset"):
                single.step(action)
            observation, _ = single.reset()
        assert equal(observation, rows(observations, 0))
    assert n_lives_lost > 0 or task_id != "Breakout-v5"


def test_a_seed_starts_anew_and_a_reset_in_the_middle_too() -> None:
    env = EnvPoolEnv("CartPole-v1")
    start, _ = env.reset(seed=1)
    env.step(0)
    assert not np.array_equal(env.reset()[0], start)
    assert env.step(0)[4]["elapsed_step"] == 1
    while not env.step(0)[2]:
        pass
    assert np.array_equal(env.reset(seed=1)[0], start)
    with pytest.raises(ValueError, match="no options at a reset"):
        env.reset(options={"low": 0.1})
    env.close()


def test_names_of_procgen_are_envpools() -> None:
    assert len(PROCGEN) == 32
    assert set(PROCGEN) <= set(envpool.list_all_envs())


@needs_procgen
def test_gymnasium_makes_procgen() -> None:
    env = gym.make("CoinrunHard-v0", num_levels=1, start_level=7, render_mode="rgb_array", render_width=64)
    levels = {env.reset(seed=seed)[1]["level_seed"] for seed in range(3)}
    assert levels == {7}
    assert env.render().shape[-1] == 3  # type: ignore[union-attr]
    assert env.spec is not None


def test_the_zoo_recognises_atari_by_the_class() -> None:
    # rl_zoo3.exp_manager.ExperimentManager.is_atari looks for this in the entry point.
    assert "AtariEnv" in EnvPoolAtariEnv.__name__
    assert "AtariEnv" not in EnvPoolEnv.__name__
