"""collect="as_ready": environments that do not wait for each other, against SB3's collection."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import SimpleMultiObsEnv
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecCheckNan,
    VecEnv,
    VecEnvWrapper,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
)

from sb3_ppo_ewma import (
    PPGEWMA,
    PPOEWMA,
    GroupedVecEnv,
    MaskablePPOEWMA,
    MaskableRecurrentPPOEWMA,
    RecurrentPPG,
    RecurrentPPOEWMA,
)
from tests.masked_envs import Masked
from tests.watching import Watch, differences, plain

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="the tests start processes by it"),
]

N_STEPS = 16
SETTINGS: dict[str, Any] = {"n_steps": N_STEPS, "batch_size": 16, "n_epochs": 2, "seed": 0, "device": "cpu"}
FORK = {"start_method": "fork"}
LSTM = {"policy_kwargs": {"lstm_hidden_size": 8}}


class Counting(gym.Env[np.ndarray, np.ndarray]):
    """
    Shows its number, its episode and its step; the reward is a function of these and the action. Every ``period``-th
    step takes longer, for each environment another one. An episode has five steps, and every second one is cut.
    """

    def __init__(self, number: int, period: int = 0) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)
        self.action_space = spaces.Box(-0.5, 0.5, (2,), np.float32)
        self.number, self.period, self.episode, self.n_steps, self.factor = number, period, -1, 0, 1.0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.episode, self.step_in_episode = self.episode + 1, 0
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action)
        if self.period and (self.n_steps + self.number) % self.period == 0:
            time.sleep(0.01)
        self.n_steps += 1
        self.step_in_episode += 1
        is_over = self.step_in_episode == 5
        reward = self.factor * self.reward_of(self._observation(), action)
        return self._observation(), reward, is_over and self.episode % 2 == 0, is_over and self.episode % 2 == 1, {}

    def slow_answer(self) -> tuple[int, int]:
        return self.number, self.n_steps

    @staticmethod
    def reward_of(observation: np.ndarray, action: np.ndarray) -> float:
        """:param observation: the next one"""
        return float(observation @ [100.0, 10.0, 1.0] + action.sum())

    def _observation(self) -> np.ndarray:
        return np.array([self.number, self.episode, self.step_in_episode], np.float32)


class SlowMasked(Masked):
    """``Masked`` whose steps take unequally long."""

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        time.sleep(0.01 * (self.np_random.random() < 0.2))
        observation, reward, _, _, info = super().step(action)
        is_over = bool(self.np_random.random() < 0.1)
        return observation, reward, False, is_over, info


class Meeting(gym.Wrapper[Any, Any, Any, Any]):
    """
    The step of the first environment ends when all others have made the given number of steps.

    :param counts: shared number of steps of each environment
    """

    def __init__(self, env: gym.Env[Any, Any], number: int, counts: Any, n_steps: int) -> None:
        super().__init__(env)
        self._number, self._counts, self._n_steps = number, counts, n_steps

    def step(self, action: Any) -> Any:
        while self._number == 0 and min(self._counts[1:]) < self._n_steps:
            time.sleep(0.001)
        self._counts[self._number] += 1
        return self.env.step(action)


def counting(n_envs: int, period: int = 5, vec_env_cls: type[VecEnv] = SubprocVecEnv, **kwargs: Any) -> VecEnv:
    makers: list[Callable[[], Any]] = [partial(Counting, number, period) for number in range(n_envs)]
    return vec_env_cls(makers, **kwargs) if vec_env_cls is DummyVecEnv else vec_env_cls(makers, **FORK, **kwargs)


def processes(env_id: Any, n_envs: int, wrapper_class: Any = None) -> VecEnv:
    return make_vec_env(
        env_id, n_envs, seed=0, wrapper_class=wrapper_class, vec_env_cls=SubprocVecEnv, vec_env_kwargs=FORK
    )


CASES: dict[str, Any] = {
    "box": lambda n: (PPOEWMA, "MlpPolicy", VecNormalize(counting(n, period=0)), {}),
    "discrete": lambda n: (PPOEWMA, "MlpPolicy", VecCheckNan(VecMonitor(processes("CartPole-v1", n))), {}),
    "sde": lambda n: (
        PPOEWMA,
        "MlpPolicy",
        VecNormalize(processes("Pendulum-v1", n)),
        {"use_sde": True, "sde_sample_freq": 4, "policy_kwargs": {"squash_output": True}},
    ),
    "frames": lambda n: (PPOEWMA, "MlpPolicy", VecFrameStack(processes("CartPole-v1", n), 3), {}),
    "dictionary": lambda n: (
        PPOEWMA,
        "MultiInputPolicy",
        VecFrameStack(VecNormalize(processes(SimpleMultiObsEnv, n), norm_obs_keys=["vec"]), 2),
        {},
    ),
    "phasic": lambda n: (PPGEWMA, "MlpPolicy", counting(n, period=0), {"n_policy_iterations": 2, "n_aux_epochs": 1}),
    "recurrent": lambda n: (RecurrentPPOEWMA, "MlpLstmPolicy", VecNormalize(counting(n, period=0)), LSTM),
    "recurrent, sde": lambda n: (RecurrentPPG, "MlpLstmPolicy", processes("Pendulum-v1", n), {**LSTM, "use_sde": True}),
    "maskable": lambda n: (MaskablePPOEWMA, "MlpPolicy", processes(Masked, n), {}),
    "both": lambda n: (MaskableRecurrentPPOEWMA, "MlpLstmPolicy", processes(Masked, n), LSTM),
}


def make(case: str, n_envs: int, **kwargs: Any) -> Any:
    algorithm, policy, env, settings = CASES[case](n_envs)
    return algorithm(policy, env, **{**SETTINGS, **settings, **kwargs})


def outcome(model: Any, callback: Watch) -> dict[str, Any]:
    venv = model.get_vec_normalize_env()
    running = [] if venv is None else [venv.ret_rms, *plain_statistics(venv.obs_rms)]
    return plain(
        {
            "parameters": dict(model.policy.state_dict()),
            "last": [model._last_obs, model._last_episode_starts],
            "statistics": [[each.mean, each.var, each.count] for each in running],
            "returns": None if venv is None else venv.returns,
            "episodes": [dict(each) for each in model.ep_info_buffer],
            "seen": callback.seen,
        }
    )


def plain_statistics(running: Any) -> list[Any]:
    return list(running.values()) if isinstance(running, dict) else [running]


def trained(case: str, n_envs: int, collect: str) -> dict[str, Any]:
    model, callback = make(case, n_envs, collect=collect), Watch()
    try:
        model.learn(2 * N_STEPS * n_envs, callback)
        return outcome(model, callback)
    finally:
        model.env.close()


@pytest.mark.parametrize("case", ["box", "sde", "recurrent", "both"])
def test_one_environment_gives_the_numbers_of_sb3s_collection(case: str) -> None:
    assert differences(trained(case, 1, "as_ready"), trained(case, 1, "together")) == []


@pytest.mark.parametrize("case", CASES)
def test_environments_that_are_ready_at_once_give_the_numbers_of_sb3s_collection(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = trained(case, 3, "together")
    wait = multiprocessing.connection.wait

    def wait_for_all(connections: list[Any], timeout: float | None = None) -> list[Any]:
        """Answers only when everything has come, so that all environments are always ready together."""
        if timeout == 0:
            return wait(connections, 0)
        found: set[Any] = set()
        while len(found) < len(connections):
            found.update(wait([each for each in connections if each not in found]))
        return list(found)

    monkeypatch.setattr(multiprocessing.connection, "wait", wait_for_all)
    assert differences(trained(case, 3, "as_ready"), expected) == []


def test_environments_do_not_wait_for_the_slowest() -> None:
    counts = multiprocessing.get_context("fork").Array("i", 3)
    env = SubprocVecEnv(
        [
            lambda number=number: Meeting(gym.make("CartPole-v1"), number, counts, N_STEPS)  # type: ignore[misc]
            for number in range(3)
        ],
        **FORK,
    )
    model = PPOEWMA("MlpPolicy", env, **SETTINGS, collect="as_ready", collector_timeout=20.0)
    model.learn(N_STEPS * 3)
    assert list(counts) == [N_STEPS] * 3
    env.close()


# ---------------------------------------------------------------------- every sample is what its environment did


@pytest.mark.parametrize("grouped", [False, True])
def test_rollouts_are_what_the_environments_did(grouped: bool) -> None:
    n_envs = 4
    env = counting(n_envs, vec_env_cls=GroupedVecEnv, n_processes=2) if grouped else counting(n_envs)
    model, callback = PPOEWMA("MlpPolicy", env, **SETTINGS, n_epochs_value=1, collect="as_ready"), Watch()
    rollouts: list[Any] = []

    class Keep(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            buffer = self.model.rollout_buffer
            names = ("observations", "actions", "episode_starts", "values", "log_probs", "advantages")
            with th.no_grad():
                flat = th.as_tensor(buffer.observations.reshape(-1, 3))
                actions = th.as_tensor(buffer.actions.reshape(-1, 2))
                values, log_probs, _ = self.model.policy.evaluate_actions(flat, actions)
            again = {
                "values_again": values.reshape(N_STEPS, n_envs),
                "log_probs_again": log_probs.reshape(N_STEPS, n_envs),
            }
            rollouts.append(plain({**{name: getattr(buffer, name) for name in names}, **again}))

    model.learn(2 * N_STEPS * n_envs, [callback, Keep()])
    env.close()
    steps = {name: np.concatenate([each[name] for each in rollouts]) for name in rollouts[0]}
    # Every environment shows its number, and its own steps in their order, five to an episode.
    index = np.arange(2 * N_STEPS)
    for number in range(n_envs):
        expected = np.stack([np.full_like(index, number), index // 5, index % 5], axis=1)
        np.testing.assert_array_equal(steps["observations"][:, number], expected)
        np.testing.assert_array_equal(steps["episode_starts"][:, number], index % 5 == 0)
    # Every sample has the value and the log-probability of its own observation and action.
    np.testing.assert_allclose(steps["values"], steps["values_again"], atol=1e-5)
    np.testing.assert_allclose(steps["log_probs"], steps["log_probs_again"], atol=1e-5)
    # What callbacks see are complete rows.
    np.testing.assert_array_equal(callback.column("num_timesteps"), n_envs * (index + 1))
    np.testing.assert_array_equal(callback.column("actions"), steps["actions"])
    next_step = np.stack([np.broadcast_to(np.arange(n_envs), (len(index), n_envs))], axis=2)
    played = np.concatenate([next_step, np.repeat((index // 5)[:, None, None], n_envs, 1)], axis=2)
    for row, seen in enumerate(callback.seen):
        for number in range(n_envs):
            reached = np.array([*played[row, number], row % 5 + 1])
            reward = Counting.reward_of(reached, seen["clipped_actions"][number])
            assert seen["rewards"][number] == pytest.approx(reward) or row % 5 == 4  # SB3 adds the value of a cut one
            assert seen["dones"][number] == (row % 5 == 4)
            if row % 5 == 4:
                np.testing.assert_array_equal(seen["infos"][number]["terminal_observation"], reached)


def test_lstm_states_are_those_of_the_environment() -> None:
    n_envs = 3
    model = RecurrentPPOEWMA("MlpLstmPolicy", counting(n_envs), **SETTINGS, **LSTM, collect="as_ready")
    callback = Watch()
    model.learn(N_STEPS * n_envs, callback)
    model.env.close()
    fresh = RecurrentPPOEWMA("MlpLstmPolicy", counting(n_envs, vec_env_cls=DummyVecEnv), **SETTINGS, **LSTM)
    states = fresh._last_lstm_states
    for seen in callback.seen:  # the policy that collected is the one before the first training
        with th.no_grad():
            dist, pi = fresh.policy.get_distribution(
                th.as_tensor(seen["obs_tensor"]), states.pi, th.as_tensor(seen["episode_starts"])
            )
            values = fresh.policy.predict_values(
                th.as_tensor(seen["obs_tensor"]), states.vf, th.as_tensor(seen["episode_starts"])
            )
            _, _, _, states = fresh.policy(
                th.as_tensor(seen["obs_tensor"]), states, th.as_tensor(seen["episode_starts"])
            )
        np.testing.assert_allclose(dist.log_prob(th.as_tensor(seen["actions"])), seen["log_probs"], atol=1e-5)
        np.testing.assert_allclose(values, seen["values"], atol=1e-5)
        np.testing.assert_allclose(states.pi[0], seen["lstm_states"][0][0], atol=1e-5)
        assert pi[0].shape == states.pi[0].shape


@pytest.mark.parametrize("algorithm", [MaskablePPOEWMA, MaskableRecurrentPPOEWMA])
def test_masks_are_those_of_the_moment(algorithm: Any) -> None:
    policy = "MlpPolicy" if algorithm is MaskablePPOEWMA else "MlpLstmPolicy"
    model, callback = algorithm(policy, processes(SlowMasked, 4), **SETTINGS, collect="as_ready"), Watch()
    model.learn(3 * N_STEPS * 4, callback)  # the environment raises an error for every invalid action
    model.env.close()
    masks, actions = callback.column("action_masks"), callback.column("actions")
    assert masks.shape == (3 * N_STEPS, 4, 6)
    assert np.take_along_axis(masks, actions[..., None], axis=2).all()
    assert (masks.sum(axis=2) == 2).all()


def test_noise_of_sde_changes_after_an_environments_own_steps() -> None:
    small = {"policy_kwargs": {"net_arch": [2], "log_std_init": 0.0}}  # so that four steps show the matrix of the noise
    settings = {**SETTINGS, **small, "use_sde": True, "sde_sample_freq": 4}
    model, callback = PPOEWMA("MlpPolicy", counting(3), **settings, collect="as_ready"), Watch()
    before = PPOEWMA("MlpPolicy", counting(3, vec_env_cls=DummyVecEnv), **settings)
    model.learn(N_STEPS * 3, callback)
    model.env.close()
    with th.no_grad():
        latent = before.policy.mlp_extractor.forward_actor(th.as_tensor(callback.column("obs_tensor")))
        noise = th.as_tensor(callback.column("actions")) - before.policy.action_net(latent)

    def misfit(number: int, start: int) -> float:
        """How far noise of four steps is from latent @ one matrix, (2, 2)."""
        own, wanted = latent[start : start + 4, number].double(), noise[start : start + 4, number].double()
        return float((own @ (th.linalg.pinv(own) @ wanted) - wanted).abs().max())

    assert max(misfit(number, start) for number in range(3) for start in range(0, N_STEPS, 4)) < 1e-5
    assert min(misfit(number, start) for number in range(3) for start in range(2, N_STEPS - 4, 4)) > 1e-3


# ---------------------------------------------------------------------- callbacks


def test_callbacks_can_talk_to_environments_in_the_middle_of_steps() -> None:
    answers: list[Any] = []

    def act(callback: Any) -> None:
        env = callback.training_env
        answers.append(env.env_method("slow_answer"))
        assert env.get_attr("number") == [0, 1, 2, 3]
        assert env.env_method("slow_answer", indices=2)[0][0] == 2
        env.set_attr("factor", 2.0)
        with th.no_grad():
            assert callback.model.policy(th.zeros(1, 3))[0].shape == (1, 2)  # does not act in the environments

    model, callback = PPOEWMA("MlpPolicy", counting(4), **SETTINGS, collect="as_ready"), Watch(act)
    model.learn(2 * N_STEPS * 4, callback)
    model.env.close()
    for row, answer in enumerate(answers):
        assert [number for number, _ in answer] == [0, 1, 2, 3]
        assert all(row < n_steps <= (row // N_STEPS + 1) * N_STEPS for _, n_steps in answer)
    np.testing.assert_array_equal(
        callback.column("obs_tensor")[:, :, 2], np.arange(2 * N_STEPS)[:, None] % 5 + [[0] * 4]
    )


def test_normalisation_is_that_of_all_environments() -> None:
    venv = VecNormalize(VecMonitor(counting(4)), clip_obs=1e6, clip_reward=1e6)
    model, callback = PPOEWMA("MlpPolicy", venv, **SETTINGS, collect="as_ready"), Watch()
    model.learn(2 * N_STEPS * 4, callback)
    venv.close()
    # The first observations and those of all steps, which do not depend on the order of the environments
    shown = np.arange(2 * N_STEPS + 1)
    seen = np.array([[number, step // 5, step % 5] for number in range(4) for step in shown])
    assert venv.obs_rms.count == pytest.approx(len(seen), abs=1e-3)
    np.testing.assert_allclose(venv.obs_rms.mean, seen.mean(0), rtol=1e-4)
    np.testing.assert_allclose(venv.obs_rms.var, seen.var(0), rtol=1e-3)
    for row, each in enumerate(callback.seen):
        observations, rewards = each["original_obs"], each["original_rewards"]
        expected = [[number, (row + 1) // 5, (row + 1) % 5] for number in range(4)]
        np.testing.assert_array_equal(observations, expected)
        if row % 5 != 4:
            played = [
                Counting.reward_of(np.array(e), a) for e, a in zip(expected, each["clipped_actions"], strict=True)
            ]
            np.testing.assert_allclose(rewards, played, rtol=1e-5)
    lengths = [info["episode"]["l"] for each in callback.seen for info in each["infos"] if "episode" in info]
    assert [int(length) for length in lengths] == [5] * (4 * (2 * N_STEPS // 5))


@pytest.mark.parametrize("n_rows", [1, 5, N_STEPS])
def test_stopped_training_goes_on_where_the_environments_are(n_rows: int) -> None:
    model = PPOEWMA("MlpPolicy", counting(4, period=3), **SETTINGS, collect="as_ready")
    stopping = Watch(lambda callback: callback.num_timesteps < 4 * n_rows)
    model.learn(N_STEPS * 4, stopping)
    assert model.num_timesteps == 4 * n_rows
    steps = [n_steps for _, n_steps in model.env.env_method("slow_answer")]
    assert all(n_rows <= n_steps <= N_STEPS for n_steps in steps)
    expected = [[number, n_steps // 5, n_steps % 5] for number, n_steps in enumerate(steps)]
    np.testing.assert_array_equal(model._last_obs, expected)
    goes_on = Watch()
    model.learn(N_STEPS * 4, goes_on, reset_num_timesteps=False)
    np.testing.assert_array_equal(goes_on.seen[0]["obs_tensor"], expected)
    assert model.num_timesteps == 4 * n_rows + 4 * N_STEPS
    model.learn(N_STEPS * 4)
    model.env.close()


def test_lstm_states_go_on_where_the_environments_are() -> None:
    model = RecurrentPPOEWMA("MlpLstmPolicy", counting(4, period=3), **SETTINGS, **LSTM, collect="as_ready")
    zero = model._last_lstm_states
    model.learn(N_STEPS * 4, Watch(lambda callback: callback.num_timesteps < 4 * 5))
    for number, (_, n_steps) in enumerate(model.env.env_method("slow_answer")):
        states: Any = tuple(each[:, :1] for each in zero.vf)
        for step in range(n_steps):  # those the policy has acted on
            observation = th.tensor([[float(number), step // 5, step % 5]])
            with th.no_grad():
                _, states = model.policy._process_sequence(
                    observation, states, th.tensor([float(step % 5 == 0)]), model.policy.lstm_critic
                )
        for state, expected in zip(model._last_lstm_states.vf, states, strict=True):
            np.testing.assert_allclose(state[:, number], expected[:, 0], atol=1e-5)
    model.env.close()


# ---------------------------------------------------------------------- errors


class Failing(Counting):
    """In its third step, the first environment does what the name says."""

    def __init__(self, number: int, how: str) -> None:
        super().__init__(number, period=5)
        self.how = how

    def step(self, action: np.ndarray) -> Any:
        if self.number == 0 and self.n_steps == 2:
            if self.how == "error":
                raise ZeroDivisionError("of the environment")
            if self.how == "exit":
                os._exit(7)
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(600)
        return super().step(action)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("error", r"process of environment 0 has ended \(exit code 1\)"),
        ("exit", r"process of environment 0 has ended \(exit code 7\)"),
        ("kill", r"process of environment 0 has ended \(exit code -9\)"),
        ("hang", r"Environment 0 has not answered for 2 seconds \(collector_timeout\)"),
    ],
)
def test_an_environment_that_fails_ends_training(how: str, message: str) -> None:
    env = SubprocVecEnv([partial(Failing, number, how) for number in range(3)], **FORK)
    model = PPOEWMA("MlpPolicy", env, **SETTINGS, collect="as_ready", collector_timeout=2.0)
    with pytest.warns(UserWarning, match="Make new ones"), pytest.raises(RuntimeError, match=message):
        model.learn(N_STEPS * 3)
    for process in env.processes:
        process.join(10)
        assert process.exitcode is not None
    with pytest.raises(ValueError, match="these have ended: give new ones"):
        model.learn(N_STEPS * 3)
    env.close()
    model.set_env(counting(3))
    model.learn(N_STEPS * 3)
    model.env.close()


def test_processes_that_ended_between_two_trainings_are_named() -> None:
    model = PPOEWMA("MlpPolicy", counting(2), **SETTINGS, collect="as_ready")
    model.learn(N_STEPS * 2)
    model.env.processes[1].kill()
    model.env.processes[1].join()
    with pytest.raises(ValueError, match="these have ended: give new ones"):
        model.learn(N_STEPS * 2)
    model.env.processes[0].terminate()


def test_an_interrupted_training_goes_on() -> None:
    def interrupt(callback: Any) -> None:
        if callback.n_calls == 4:
            raise KeyboardInterrupt

    model = PPOEWMA("MlpPolicy", counting(4, period=3), **SETTINGS, collect="as_ready")
    with pytest.raises(KeyboardInterrupt):
        model.learn(N_STEPS * 4, Watch(interrupt))
    callback = Watch()
    model.learn(2 * N_STEPS * 4, callback)
    model.env.close()
    np.testing.assert_array_equal(
        callback.column("obs_tensor")[:, :, 2], np.broadcast_to(np.arange(2 * N_STEPS)[:, None] % 5, (2 * N_STEPS, 4))
    )


def test_a_message_that_is_half_read_ends_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    model = PPOEWMA("MlpPolicy", counting(3), **SETTINGS, collect="as_ready")
    model.learn(N_STEPS * 3)
    receive = multiprocessing.connection.Connection._recv_bytes

    def interrupted(self: Any, *args: Any) -> Any:
        receive(self, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(multiprocessing.connection.Connection, "_recv_bytes", interrupted)
    with pytest.warns(UserWarning, match="half read.*Make new ones"), pytest.raises(KeyboardInterrupt):
        model.learn(N_STEPS * 3, reset_num_timesteps=False)
    assert model.env.closed


# ---------------------------------------------------------------------- what is refused


class Doubling(VecEnvWrapper):
    """A wrapper that nobody knows."""

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        observations, rewards, dones, infos = self.venv.step_wait()
        return observations, 2 * rewards, dones, infos


class OwnRewards(PPOEWMA):
    """Calls the collection of the algorithm."""

    calls = 0

    def collect_rollouts(self, *args: Any, **kwargs: Any) -> bool:
        self.calls += 1
        return super().collect_rollouts(*args, **kwargs)


class OwnLoop(PPOEWMA):
    """Collects in a way of its own."""

    def collect_rollouts(self, *args: Any, **kwargs: Any) -> bool:
        raise NotImplementedError


def test_an_override_is_called() -> None:
    model = OwnRewards("MlpPolicy", counting(2), **SETTINGS, collect="as_ready")
    model.learn(2 * N_STEPS * 2)
    model.env.close()
    assert model.calls == 2


@pytest.mark.parametrize(
    ("algorithm", "env", "message"),
    [
        (PPOEWMA, lambda: counting(2, vec_env_cls=DummyVecEnv), "SubprocVecEnv or GroupedVecEnv, got DummyVecEnv"),
        (PPOEWMA, lambda: VecNormalize(Doubling(counting(2))), "cannot step Doubling for some of its environments"),
        (OwnLoop, lambda: counting(2), r"no effect on OwnLoop.collect_rollouts\(\)"),
    ],
)
def test_what_cannot_collect_as_ready_is_refused(algorithm: Any, env: Any, message: str) -> None:
    model = algorithm("MlpPolicy", env(), **SETTINGS, collect="as_ready")
    with pytest.raises(ValueError, match=message):
        model.learn(N_STEPS * 2)
    assert model.num_timesteps == 0
    model.env.close()


def test_a_compiled_policy_is_refused() -> None:
    model = PPOEWMA("MlpPolicy", counting(2), **SETTINGS, collect="as_ready")
    model.policy = th.compile(model.policy)
    with pytest.raises(ValueError, match=r"cannot act with a policy compiled by torch.compile\(policy\)"):
        model.learn(N_STEPS * 2)
    model.env.close()


def test_other_values_are_refused() -> None:
    with pytest.raises(ValueError, match="collect must be one of 'together', 'as_ready', got 'ready'"):
        PPOEWMA("MlpPolicy", "CartPole-v1", collect="ready")  # type: ignore[arg-type]


def test_changed_actions_are_refused() -> None:
    from stable_baselines3 import PPO

    from sb3_ppo_ewma import EwmaMixin

    class Greedy(PPO):
        """Steps with other actions than its policy's."""

        def collect_rollouts(self, env: Any, *args: Any) -> bool:  # type: ignore[override]
            self.policy(th.as_tensor(self._last_obs))
            env.step(np.zeros((env.num_envs, 2), np.float32))
            return True

    class GreedyEwma(EwmaMixin, Greedy):
        pass

    model = GreedyEwma("MlpPolicy", counting(2), **SETTINGS, collect="as_ready")
    with pytest.raises(ValueError, match="steps the environments with the policy's actions"):
        model.learn(N_STEPS * 2)
    assert model.env.env_method("slow_answer") == [(0, 1), (1, 1)]  # nothing is left in the pipes
    model.env.close()


# ---------------------------------------------------------------------- together with the rest


def test_another_process_collects_as_ready() -> None:
    model = PPOEWMA("MlpPolicy", VecNormalize(counting(3)), **SETTINGS, collect="as_ready", max_policy_lag=1)
    callback = Watch()
    model.learn(3 * N_STEPS * 3, callback)
    episode_steps = [[seen["original_rewards"].shape, seen["rewards"].shape] for seen in callback.seen]
    assert np.array_equal(episode_steps, [[(3,), (3,)]] * (3 * N_STEPS))
    model.env.close()


@pytest.mark.parametrize("name", ["new_obs", "dones"])
def test_what_later_steps_depend_on_cannot_be_changed(name: str) -> None:
    class Changes(BaseCallback):
        def _on_step(self) -> bool:
            self.locals[name][:] = 1
            return True

    model = PPOEWMA("MlpPolicy", counting(2), **SETTINGS, collect="as_ready")
    with pytest.raises(ValueError, match="read-only"):
        model.learn(N_STEPS * 2, Changes())
    model.env.close()


def test_saved_models_keep_it(tmp_path: Any) -> None:
    model = PPOEWMA("MlpPolicy", counting(2), **SETTINGS, collect="as_ready")
    model.learn(N_STEPS * 2)
    model.save(tmp_path / "model")
    loaded = PPOEWMA.load(tmp_path / "model", env=model.env)
    assert loaded.collect == "as_ready"
    loaded.learn(N_STEPS * 2)
    model.env.close()


# ---------------------------------------------------------------------- several environments in a process


def test_grouped_environments_are_those_of_subproc_vec_env() -> None:
    envs = [
        GroupedVecEnv([partial(Counting, number) for number in range(5)], n_processes=2, start_method=method)
        for method in ("fork", "spawn")
    ]
    envs.append(counting(5, period=0))
    actions = np.full((5, 2), 0.25, np.float32)
    results: list[Any] = []
    for env in envs:
        env.seed(3)
        found = [env.reset()]
        for _ in range(6):
            found.append(env.step(actions))
        found += [env.get_attr("number"), env.env_method("slow_answer", indices=[1, 4]), env.has_attr("nothing")]
        env.set_attr("factor", 3.0, indices=[4])
        found += [env.step(actions)[1], env.env_is_wrapped(gym.Wrapper), env.reset_infos]
        results.append(plain(found))
        env.close()
        assert not any(process.is_alive() for process in env.processes)
    assert len(set(envs[0].processes)) == 2
    assert differences(results[0], results[2]) == []
    assert differences(results[1], results[2]) == []


@pytest.mark.parametrize(("n_envs", "n_processes"), [(0, 1), (2, 3), (2, 0)])
def test_groups_without_environments_are_refused(n_envs: int, n_processes: int) -> None:
    with pytest.raises(ValueError, match=r"env_fns|n_processes"):
        GroupedVecEnv([partial(Counting, number) for number in range(n_envs)], n_processes=n_processes)


def test_wrong_arguments_of_groups_are_named() -> None:
    with pytest.raises(TypeError, match=r"GroupedVecEnv\(\) got .* 'n_proceses'. Did you mean 'n_processes'\?"):
        GroupedVecEnv([partial(Counting, 0)], n_proceses=1)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"start_method must be one of .*, got 'thread'"):
        GroupedVecEnv([partial(Counting, 0)], start_method="thread")


# ---------------------------------------------------------------------- the command line


@pytest.mark.slow
def test_the_zoo_collects_as_ready(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    zoo = pytest.importorskip("sb3_ppo_ewma.zoo")
    command = ["train", "--algo", "ppo_ewma", "--env", "CartPole-v1", "-f", str(tmp_path), "-n", "128", "--seed", "1"]
    command += ["--eval-freq", "64", "--eval-episodes", "1", "--device", "cpu"]
    params = ["-params", "n_envs:2", "n_steps:16", "batch_size:16", "n_epochs:1", "collect:'as_ready'"]
    zoo.main([*command, "--vec-env", "subproc", *params])
    assert (tmp_path / "ppo_ewma" / "CartPole-v1_1" / "CartPole-v1.zip").is_file()
    assert PPOEWMA.load(tmp_path / "ppo_ewma" / "CartPole-v1_1" / "CartPole-v1.zip").collect == "as_ready"
