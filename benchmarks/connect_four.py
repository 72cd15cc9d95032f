"""
Masked self-play: Connect Four from PettingZoo, learned by playing against oneself, then played against a random player.
From the root of the repository:

    python -m benchmarks.connect_four

Every algorithm is trained with every seed; then it plays 100 games, in every other one of which it begins.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import sb3_contrib
from pettingzoo import AECEnv
from pettingzoo.classic import connect_four_v3
from sb3_contrib.common.maskable.utils import get_action_masks
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_vec_env

import sb3_ppo_ewma

HERE = Path(__file__).parent
TARGET = 90
N_GAMES = 100
SEEDS = [0, 1, 2]
N_ENVS = 8
# The same policy phase for all. The others are the defaults of SB3's PPO, and of PPG.
SETTINGS: dict[str, Any] = {"n_steps": 128, "batch_size": 256, "n_epochs": 4, "ent_coef": 0.01, "learning_rate": 1e-3}
PHASE: dict[str, Any] = {"n_policy_iterations": 8, "n_aux_epochs": 3, "aux_batch_size": 512}
ALGORITHMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "MaskablePPO": (sb3_contrib, {}),
    "MaskablePPOEWMA": (sb3_ppo_ewma, {}),
    "MaskablePPGEWMA": (sb3_ppo_ewma, PHASE),
}

Player = Callable[[np.ndarray, np.ndarray], int]


class OnePlayer(gym.Env[np.ndarray, np.int64]):
    """
    A game of PettingZoo for two players as an environment for one of them, with masks of the valid actions. The other
    player's moves are part of a step.

    :param game: whose observations have the entries ``observation`` and ``action_mask``
    :param opponent: chooses the other player's moves, given observation and mask
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
        :param seed: of the game, and of who begins
        :param options: ``{"player": 0}`` begins, ``{"player": 1}`` does not; without it, one of them is drawn
        :return: the first observation of the player, and what the game tells
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
            has_ended = terminated or truncated
            self.game.step(None if has_ended else self.opponent(seen["observation"], _mask_of(seen)))
        # The reward is the sum of those since the player's last turn.
        seen, reward, terminated, truncated, info = self.game.last()
        self._mask = _mask_of(seen)
        return seen["observation"], float(reward), terminated, truncated, info


def _mask_of(seen: dict[str, np.ndarray]) -> np.ndarray:
    return seen["action_mask"].astype(bool)


class Myself:
    """
    The opponent in self-play: the model that is being trained. It learns between rollouts, so that during one the
    opponent does not change.

    :ivar model: to be set once it is built
    """

    model: BaseAlgorithm

    def __call__(self, observation: np.ndarray, mask: np.ndarray) -> int:
        action, _ = self.model.predict(observation, action_masks=mask)  # type: ignore[call-arg]  # of the maskable ones
        return int(action)


def random_player(seed: int) -> Player:
    """
    :param seed: of its moves
    :return: chooses any valid action
    """
    rng = np.random.default_rng(seed)
    return lambda observation, mask: int(rng.choice(np.flatnonzero(mask)))


def train(name: str, seed: int, n_timesteps: int) -> BaseAlgorithm:
    """
    :param name: of the algorithm
    :param seed: of the training
    :param n_timesteps: moves of the learner
    :return: trained by playing against itself
    """
    module, further = ALGORITHMS[name]
    myself = Myself()
    env = make_vec_env(lambda: OnePlayer(connect_four_v3.env(), myself), N_ENVS, seed=seed)
    model = getattr(module, name)("MlpPolicy", env, seed=seed, device="cpu", **SETTINGS, **further)
    myself.model = model
    return model.learn(n_timesteps)


def play(model: BaseAlgorithm, opponent: Player, n_games: int) -> dict[str, int]:
    """
    :param model: plays the actions it takes for the best ones, and begins every other game
    :param opponent: of the model
    :param n_games: number of games
    :return: how many were won, drawn and lost
    """
    env = OnePlayer(connect_four_v3.env(), opponent)
    results = []
    for game in range(n_games):
        observation, _ = env.reset(seed=game, options={"player": game % 2})
        has_ended = False
        while not has_ended:
            action, _ = model.predict(observation, deterministic=True, action_masks=get_action_masks(env))
            observation, reward, terminated, truncated, _ = env.step(action)
            has_ended = terminated or truncated
        results.append(reward)
    return {"won": results.count(1.0), "drawn": results.count(0.0), "lost": results.count(-1.0)}
