"""
Train, stop, go on in a fresh process: shared by ``test_resume.py`` and, as ``python -m tests.resume FOLDER``, by the
process it starts. Environments are carried over with their state, as pickles.
"""

import pathlib
import pickle
import random
import sys
import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

from sb3_ppo_ewma import (
    PPG,
    PPGEWMA,
    PPOEWMA,
    AuxiliaryPhaseMixin,
    MaskablePPGEWMA,
    MaskablePPOEWMA,
    MaskableRecurrentPPGEWMA,
    MaskableRecurrentPPOEWMA,
    RecurrentPPG,
    RecurrentPPOEWMA,
)

N_STEPS = 32
QUICK = {"n_steps": N_STEPS, "batch_size": 24, "n_epochs": 2, "device": "cpu", "learning_rate": 1e-2}
SMALL = {"net_arch": [8]}
LSTM = {**SMALL, "lstm_hidden_size": 8}
# 5 rollouts before the interruption: one phase, and 2 rollouts of the next; it ends with the first rollout after it
PHASES = {"n_policy_iterations": 3, "n_aux_epochs": 2, "aux_batch_size": 48, "aux_learning_rate": 1e-3}


class WalkEnv(gym.Env):
    """A random walk that draws from its own generator, from numpy's and from torch's; all its state can be pickled."""

    def __init__(self, action_space: spaces.Space) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,))
        self.action_space = action_space
        self.state, self.n = np.zeros(2), 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.state, self.n = self.np_random.normal(size=2), 0
        return self.observation(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.n += 1
        self.state += 0.1 * self.np_random.normal(size=2) + 0.01 * np.random.rand() + 0.01 * th.rand(()).item()
        self.state[0] += 0.1 * float(np.sum(action))
        done = self.n >= 11
        return self.observation(), -float(abs(self.state[0])), done, False, {}

    def observation(self) -> Any:
        return self.state.astype(np.float32)

    def action_masks(self) -> np.ndarray:
        return np.array([True, self.n % 2 == 0, True])


class ImageWalkEnv(WalkEnv):
    """Shows the walk as the brightness of two halves of a noisy image. Channels first: no wrapper moves them."""

    def __init__(self, action_space: spaces.Space) -> None:
        super().__init__(action_space)
        self.observation_space = spaces.Box(0, 255, (1, 36, 36), np.uint8)

    def observation(self) -> Any:
        levels = np.clip(128 + 40 * self.state, 0, 235).repeat(18).astype(np.uint8)
        return levels + self.np_random.integers(20, size=(1, 36, 36), dtype=np.uint8)


class DictWalkEnv(WalkEnv):
    """Shows the walk and the time."""

    def __init__(self, action_space: spaces.Space) -> None:
        super().__init__(action_space)
        self.observation_space = spaces.Dict({"walk": self.observation_space, "time": spaces.Discrete(12)})

    def observation(self) -> Any:
        return {"walk": super().observation(), "time": self.n}


def half(progress: float) -> float:
    """:return: a learning rate that ends at half of where it starts"""
    return 1e-3 * (1 + progress)


DISCRETE, BOX = spaces.Discrete(3), spaces.Box(-1, 1, (2,))

# name: class, action space, arguments
RUNS: dict[str, tuple[type, spaces.Space, dict[str, Any]]] = {
    "ewma": (PPOEWMA, DISCRETE, {"policy": "MlpPolicy", "policy_kwargs": SMALL, "clip_range": 0.01}),
    "seeded": (PPOEWMA, DISCRETE, {"policy": "MlpPolicy", "policy_kwargs": SMALL, "seed": 3}),
    "no ewma": (PPOEWMA, DISCRETE, {"policy": "MlpPolicy", "policy_kwargs": SMALL, "prox_decay": None}),
    "kl": (
        PPOEWMA,
        BOX,
        {
            "policy": "MlpPolicy",
            "policy_kwargs": SMALL,
            "clip_range": None,
            "kl_coef": 1.0,
            "kl_estimator": "analytic",
            "prox_decay": 0.95,
        },
    ),
    "gSDE": (PPOEWMA, BOX, {"policy": "MlpPolicy", "policy_kwargs": SMALL, "use_sde": True, "sde_sample_freq": 5}),
    "moments, value epochs": (
        PPOEWMA,
        BOX,
        {"policy": "MlpPolicy", "policy_kwargs": SMALL, "advantage_decay": 0.7, "n_epochs_value": 3},
    ),
    "everything": (
        PPOEWMA,
        DISCRETE,
        {
            "policy": "MlpPolicy",
            "policy_kwargs": SMALL,
            "prox_decay": 0.9,
            "advantage_decay": 0.7,
            "n_epochs_value": 1,
            "recompute_advantages": True,
            "staleness": 2,
            "staleness_mode": "proximal",
        },
    ),
    "recurrent": (
        RecurrentPPOEWMA,
        DISCRETE,
        {"policy": "MlpLstmPolicy", "policy_kwargs": LSTM, "staleness": 1},
    ),
    "maskable": (MaskablePPOEWMA, DISCRETE, {"policy": "MlpPolicy", "policy_kwargs": SMALL}),
    "both": (
        MaskableRecurrentPPOEWMA,
        DISCRETE,
        {"policy": "MlpLstmPolicy", "policy_kwargs": LSTM, "staleness": 1, "recompute_advantages": True},
    ),
    "ppg": (PPG, DISCRETE, {"policy": "MlpPolicy", "policy_kwargs": SMALL, **PHASES}),
    # With a trunk for each, normalised observations and rewards, and a learning rate that has changed since the start
    "ppg, dual": (
        PPGEWMA,
        BOX,
        {
            "policy": "MlpPolicy",
            "policy_kwargs": {**SMALL, "trunk_arch": [8]},
            "n_epochs_value": 1,
            **PHASES,
            "aux_learning_rate": half,
        },
    ),
    "ppg, images": (
        PPGEWMA,
        BOX,
        {
            "policy": "CnnPolicy",
            "policy_kwargs": {**SMALL, "critic_arch": "detach", "features_extractor_kwargs": {"features_dim": 8}},
            **PHASES,
        },
    ),
    "ppg, dictionaries": (
        PPG,
        DISCRETE,
        {"policy": "MultiInputPolicy", "policy_kwargs": {**SMALL, "critic_arch": "shared"}, **PHASES},
    ),
    "ppg, recurrent": (RecurrentPPG, BOX, {"policy": "MlpLstmPolicy", "policy_kwargs": LSTM, **PHASES}),
    "ppg, maskable": (MaskablePPGEWMA, DISCRETE, {"policy": "MlpPolicy", "policy_kwargs": SMALL, **PHASES}),
    "ppg, both": (
        MaskableRecurrentPPGEWMA,
        DISCRETE,
        {"policy": "MlpLstmPolicy", "policy_kwargs": {**LSTM, "shared_lstm": True}, "n_epochs_value": 1, **PHASES},
    ),
    # 4 rollouts are trained on before the interruption, one waits; the phase ends with the second one after it.
    "ppg, stale": (
        PPGEWMA,
        DISCRETE,
        {"policy": "MlpPolicy", "policy_kwargs": SMALL, "staleness": 1, "advantage_decay": 0.7, **PHASES},
    ),
}
NORMALIZED = {"everything", "ppg, dual", "ppg, recurrent"}
ENVIRONMENTS = {"ppg, images": ImageWalkEnv, "ppg, dictionaries": DictWalkEnv}
PHASIC = [name for name in RUNS if name.startswith("ppg")]


def start(name: str) -> BaseAlgorithm:
    """Train the first half."""
    algorithm, action_space, kwargs = RUNS[name]
    environment = ENVIRONMENTS.get(name, WalkEnv)
    env: VecEnv = DummyVecEnv([lambda: environment(action_space)] * 2)
    if name in NORMALIZED:
        env = VecNormalize(env)
    # 5 rollouts, so that both the queue and the moments have filled
    return algorithm(env=env, **{**QUICK, **kwargs}).learn(5 * N_STEPS * env.num_envs)


def stop(model: BaseAlgorithm, folder: pathlib.Path) -> None:
    """Write all that belongs to the run."""
    folder.mkdir()
    model.save(folder / "model")
    if model.replay_buffer is not None:
        model.save_replay_buffer(folder / "rollouts")
    env, normalization = model.get_env(), model.get_vec_normalize_env()
    if normalization is not None:
        # Its own file leaves out the environment and the running returns of the episodes under way.
        normalization.save(folder / "vec_normalize.pkl")
        np.save(folder / "returns.npy", normalization.returns)
        env = normalization.venv
    (folder / "env.pkl").write_bytes(pickle.dumps(env))


def resume(name: str, folder: pathlib.Path, with_rollouts: bool = True) -> BaseAlgorithm:
    """Read it back."""
    env: VecEnv = pickle.loads((folder / "env.pkl").read_bytes())
    if (folder / "vec_normalize.pkl").exists():
        env = VecNormalize.load(str(folder / "vec_normalize.pkl"), env)
        env.returns = np.load(folder / "returns.npy")
    model = RUNS[name][0].load(folder / "model", env=env, force_reset=False)
    if with_rollouts and model.replay_buffer is not None:
        model.load_replay_buffer(folder / "rollouts")
    return model


def go_on(model: BaseAlgorithm) -> dict[str, dict]:
    """Train the second half and return parameters, averages, optimisers, kept rollouts and the next random numbers."""
    model.learn(3 * N_STEPS * model.n_envs, reset_num_timesteps=False)
    lstm_state = model.lstm_state.state_dict() if hasattr(model, "lstm_state") else {}
    draws = {"torch": th.rand(4), "numpy": np.random.rand(4).tolist(), "python": random.random()}
    return {**model.get_parameters(), "lstm_state": lstm_state, "phases": phases(model), "draws": draws}


def phases(model: BaseAlgorithm) -> dict[str, Any]:
    """:return: the number of auxiliary phases, and what is stored for the next one"""
    if not isinstance(model, AuxiliaryPhaseMixin):
        return {}
    stored = [
        {name: th.from_numpy(array.copy()) for name, array in piece.items()} for piece in model.phase_buffer.pieces()
    ]
    return {"number": model._n_phases, "stored": stored}


if __name__ == "__main__":
    th.set_num_threads(1)
    warnings.filterwarnings("error", "The queue of stale rollouts")
    warnings.filterwarnings("error", ".*the phase starts anew")
    root = pathlib.Path(sys.argv[1])
    for i, run in enumerate(RUNS):
        th.rand(i), np.random.rand(i)  # generators of another state than at the start
        th.save(go_on(resume(run, root / run)), root / f"{run}.pth")
