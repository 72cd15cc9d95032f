"""What rl-zoo3 and gymnasium are told."""

import importlib.util

import gymnasium as gym
import rl_zoo3.utils
from rl_zoo3 import exp_manager
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
from rl_zoo3.utils import ALGOS

from sb3_ppo_ewma.networks import FEATURES_EXTRACTORS
from sb3_ppo_ewma.zoo import data_parallel, experiment, vec_envs
from sb3_ppo_ewma.zoo.algorithms import ALGORITHMS
from sb3_ppo_ewma.zoo.search_space import SEARCH_SPACES

_MINATAR_GAMES = ("asterix", "breakout", "freeway", "seaquest", "space_invaders")


def register() -> None:
    """See :func:`sb3_ppo_ewma.zoo.register`."""
    # All three are dictionaries that the zoo's modules share: change them, do not replace them.
    for name, algorithm in ALGORITHMS.items():
        sampler, converter = SEARCH_SPACES[name]
        ALGOS.setdefault(name, algorithm)
        HYPERPARAMS_SAMPLER.setdefault(name, sampler)
        HYPERPARAMS_CONVERTER.setdefault(name, converter)
    experiment.mend()
    vec_envs.mend()
    data_parallel.mend()  # last: it divides what the others find
    _name_features_extractors()
    _register_minatar()


def _name_features_extractors() -> None:
    # The namespaces in which policy_kwargs of a file, and -params of the command line, are evaluated
    for name, extractor in FEATURES_EXTRACTORS.items():
        for module in (exp_manager, rl_zoo3.utils):
            vars(module).setdefault(name, extractor)


def _register_minatar() -> None:
    if importlib.util.find_spec("minatar") is None:
        return
    # By name, not through minatar.gym.register_envs(): that imports seaborn, a second at every start.
    for game in _MINATAR_GAMES:
        for version, minimal_actions in ((0, False), (1, True)):
            env_id = f"MinAtar/{game.title().replace('_', '')}-v{version}"
            if env_id not in gym.registry:
                kwargs = {"game": game, "use_minimal_action_set": minimal_actions}
                gym.register(env_id, entry_point="minatar.gym:BaseEnv", kwargs=kwargs)
