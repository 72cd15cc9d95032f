"""
Masked self-play: algorithms learn PettingZoo's Connect Four by playing against themselves, then play against a random
player. From the root of the repository:

    python -m benchmarks.connect_four

Every algorithm is trained with every seed, and plays 100 games afterwards. It begins half of them.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import sb3_contrib
import torch as th
from pettingzoo import AECEnv
from pettingzoo.classic import connect_four_v3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_vec_env

import sb3_ppo_ewma
from benchmarks.metadata import metadata

HERE = Path(__file__).parent
TARGET = 90
N_ENVS = 8
# The same for all; the rest are the defaults of SB3's PPO, and of PPG
SETTINGS: dict[str, Any] = {
    "n_steps": 64,
    "batch_size": 256,
    "n_epochs": 10,
    "learning_rate": 5e-4,
    "ent_coef": 0.01,
}
# Filters of the size of four in a row
NETWORK: dict[str, Any] = {"channels": [32], "kernel_size": 4, "features_dim": 128, "channels_last": True}
PHASE: dict[str, Any] = {"n_policy_iterations": 8, "aux_batch_size": 256}
ALGORITHMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "MaskablePPO": (sb3_contrib, {}),
    "MaskablePPOEWMA": (sb3_ppo_ewma, {}),
    "MaskablePPGEWMA": (sb3_ppo_ewma, PHASE),
}
# Share of random moves of the opponent in self-play, without which the learner never sees most positions
EXPLORATION = 0.5

# Chooses a move, given an observation and the mask of valid actions
Player = Callable[[np.ndarray, np.ndarray], int]


class OnePlayer(gym.Env[np.ndarray, np.int64]):
    """
    A game of PettingZoo for two players as an environment for one of them, with masks of the valid actions. A step is
    the player's move and the opponent's answer.

    :param game: its observations have the entries ``observation`` and ``action_mask``
    :param opponent: chooses the other player's moves
    """

    def __init__(self, game: AECEnv, opponent: Player) -> None:
        self.game, self.opponent = game, opponent
        first = game.possible_agents[0]
        self.observation_space = game.observation_space(first)["observation"]
        self.action_space = game.action_space(first)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """
        :param seed: of the game, and of the draw who begins
        :param options: ``{"player": 0}``: the player begins; ``{"player": 1}``: the opponent does; ``None``: drawn
        :return: the player's first observation, and the game's info
        """
        super().reset(seed=seed)
        self.game.reset(seed)
        drawn = self.np_random.integers(2)
        self.player = self.game.possible_agents[(options or {}).get("player", drawn)]
        observation, _, _, _, info = self._next_turn()
        return observation, info

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.game.step(int(action))
        return self._next_turn()

    def action_masks(self) -> np.ndarray:
        """
        :return: (actions,) whether each is valid
        """
        return self._mask

    def _next_turn(self) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        while self.game.agent_selection != self.player:
            seen, _, terminated, truncated, _ = self.game.last()
            is_over = terminated or truncated
            self.game.step(None if is_over else self.opponent(seen["observation"], _mask_of(seen)))
        # last() has the sum of the rewards since the player's previous turn.
        seen, reward, terminated, truncated, info = self.game.last()
        self._mask = _mask_of(seen)
        return seen["observation"], float(reward), terminated, truncated, info


def _mask_of(seen: dict[str, np.ndarray]) -> np.ndarray:
    return seen["action_mask"].astype(bool)


class Myself:
    """
    The opponent in self-play: the model in training, which changes only between rollouts, with some random moves.

    :param seed: of the random moves
    :ivar model: set it when it is built
    """

    model: BaseAlgorithm

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def __call__(self, observation: np.ndarray, mask: np.ndarray) -> int:
        if self._rng.random() < EXPLORATION:
            return random_move(self._rng, mask)
        action, _ = self.model.predict(observation, action_masks=mask)  # type: ignore[call-arg]  # only maskable models
        return int(action)


def random_move(rng: np.random.Generator, mask: np.ndarray) -> int:
    """
    :param rng: source of randomness
    :param mask: valid actions
    :return: one of them
    """
    return int(rng.choice(np.flatnonzero(mask)))


def train(name: str, seed: int, n_timesteps: int) -> BaseAlgorithm:
    """
    :param name: of the algorithm
    :param seed: of training
    :param n_timesteps: moves of the learner
    :return: the model, trained against itself
    """
    module, further = ALGORITHMS[name]
    myself = Myself(seed)
    env = make_vec_env(lambda: OnePlayer(connect_four_v3.env(), myself), N_ENVS, seed=seed)
    policy_kwargs = {
        "features_extractor_class": sb3_ppo_ewma.SmallGridCNN,
        "features_extractor_kwargs": NETWORK,
        "net_arch": [],
    }
    settings = {**SETTINGS, **further, "policy_kwargs": policy_kwargs}
    model: BaseAlgorithm = getattr(module, name)("MlpPolicy", env, seed=seed, device="cpu", **settings)
    myself.model = model
    return model.learn(n_timesteps)


def play(model: Any, n_games: int, seed: int = 0) -> dict[str, int]:
    """
    :param model: plays its most likely moves
    :param n_games: number of games; the model begins every other one
    :param seed: of the random player
    :return: how many games the model won, drew and lost
    """
    rng = np.random.default_rng(seed)
    env = OnePlayer(connect_four_v3.env(), lambda _, mask: random_move(rng, mask))
    rewards = []
    for game in range(n_games):
        observation, _ = env.reset(seed=game, options={"player": game % 2})
        is_over = False
        while not is_over:
            action, _ = model.predict(observation, deterministic=True, action_masks=env.action_masks())
            observation, reward, terminated, truncated, _ = env.step(action)
            is_over = terminated or truncated
        rewards.append(reward)
    return {"won": rewards.count(1.0), "drawn": rewards.count(0.0), "lost": rewards.count(-1.0)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--timesteps", type=int, default=100_000, help="moves of the learner (default: 100000)")
    parser.add_argument("--games", type=int, default=100, help="against the random player (default: 100)")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "connect_four.json")
    args = parser.parse_args()
    th.set_num_threads(1)
    hyperparameters = {name: {**SETTINGS, **ALGORITHMS[name][1]} for name in args.algorithms}
    settings = {
        "n_timesteps": args.timesteps,
        "n_envs": N_ENVS,
        "exploration": EXPLORATION,
        "SmallGridCNN": NETWORK,
        "hyperparameters": hyperparameters,
    }
    content: dict[str, Any] = {"results": [], "target": TARGET, "settings": settings, **metadata()}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for name in args.algorithms:
            began = time.monotonic()
            games = play(train(name, seed, args.timesteps), args.games)
            result = {"algorithm": name, "seed": seed, **games, "seconds": round(time.monotonic() - began)}
            content["results"].append(result)
            args.output.write_text(json.dumps(content, indent=1) + "\n")
            print(f"{name} seed {seed}: {games['won']} of {args.games} games won, {games['drawn']} drawn", flush=True)
    print(f"target: at least {TARGET} of 100 won")


if __name__ == "__main__":
    main()
