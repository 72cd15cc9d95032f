"""Register our algorithms, features extractors and environments with rl-zoo3 and gymnasium."""

import importlib.util

import gymnasium as gym
import rl_zoo3.utils
from rl_zoo3 import exp_manager
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
from rl_zoo3.utils import ALGOS

from sb3_ppo_ewma.networks import FEATURES_EXTRACTORS
from sb3_ppo_ewma.zoo import (
    action_masks,
    data_parallel,
    experiment,
    interruptions,
    resuming,
    trained_agents,
    vec_envs,
)
from sb3_ppo_ewma.zoo.algorithms import ALGORITHMS, BASELINES
from sb3_ppo_ewma.zoo.patches import apply_patches
from sb3_ppo_ewma.zoo.search_space import SEARCH_SPACES

_MINATAR_GAMES = ("asterix", "breakout", "freeway", "seaquest", "space_invaders")


def register() -> None:
    """See :func:`sb3_ppo_ewma.zoo.register`."""
    # The zoo's modules share these three dictionaries: change them in place.
    for name, algorithm in {**ALGORITHMS, **BASELINES}.items():
        sampler, converter = SEARCH_SPACES[name]
        ALGOS.setdefault(name, algorithm)
        HYPERPARAMS_SAMPLER.setdefault(name, sampler)
        HYPERPARAMS_CONVERTER.setdefault(name, converter)
    apply_patches()
    experiment.install_hooks()
    trained_agents.install_hooks()
    vec_envs.install_hooks()
    action_masks.install_hooks()  # after the algorithms are in ALGOS
    resuming.install_hooks()
    data_parallel.install_hooks()  # after those whose hyper-parameters it divides
    interruptions.install_hooks()  # last: around all that may fail
    _name_features_extractors()
    _register_minatar()


def _name_features_extractors() -> None:
    # The zoo evaluates policy_kwargs of a file and -params of the command line in these namespaces.
    for name, extractor in FEATURES_EXTRACTORS.items():
        for module in (exp_manager, rl_zoo3.utils):
            vars(module).setdefault(name, extractor)


def _register_minatar() -> None:
    if importlib.util.find_spec("minatar") is None:
        return
    # minatar.gym.register_envs() would import seaborn, which takes a second at every start.
    for game in _MINATAR_GAMES:
        for version, minimal_actions in ((0, False), (1, True)):
            env_id = f"MinAtar/{game.title().replace('_', '')}-v{version}"
            if env_id not in gym.registry:
                kwargs = {"game": game, "use_minimal_action_set": minimal_actions}
                gym.register(env_id, entry_point="minatar.gym:BaseEnv", kwargs=kwargs)
