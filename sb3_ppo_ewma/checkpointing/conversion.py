"""Models as the SB3 algorithm they extend sees them: as a file that it can load, or as a model of its class."""

import copy
from collections.abc import Collection
from typing import Any, TypeVar

from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from sb3_ppo_ewma._arguments import is_clip_off, warn_caller
from sb3_ppo_ewma._parallel.process_group import without_group
from sb3_ppo_ewma.checkpointing.generators import preserved_generators

Model = TypeVar("Model", bound=OnPolicyAlgorithm)

# Stored as the clip_range of a model without clip. SB3 refuses it as a schedule, and its message ends in this text.
CLIP_OFF_IN_FILE = (
    "the clip_range=None of this model, which PPO cannot train with: load it with the class that saved it and call "
    "to_ppo(), or give load() a clip_range"
)


def copy_to_save(model: Model, own_states: Collection[str]) -> Model:
    """
    Copy a model so that SB3 writes a file that plain PPO can load.

    :param model: the model; the copy shares all attributes with it
    :param own_states: names of the attributes that plain PPO does not have, ``None`` in the copy
    :return: the copy, only to be saved
    """
    plain = copy.copy(model)
    attributes = vars(plain)
    attributes.update(dict.fromkeys(own_states))
    attributes["data_parallel"] = without_group(attributes["data_parallel"])
    if is_clip_off(attributes["clip_range"]):
        attributes["clip_range"] = CLIP_OFF_IN_FILE
    return plain


def convert_to_sb3(
    model: OnPolicyAlgorithm, sb3_class: type[OnPolicyAlgorithm], excluded: Collection[str]
) -> OnPolicyAlgorithm:
    """
    Build a model of an SB3 class with the policy, optimiser, hyper-parameters, counters and environment of a model.

    :param model: model of a class derived from ``sb3_class``
    :param sb3_class: ``PPO``, ``RecurrentPPO`` or ``MaskablePPO``
    :param excluded: names of the attributes that SB3 does not save
    :return: the new model, which can be trained without changing the old one
    """
    create: Any = sb3_class
    converted: OnPolicyAlgorithm = create(model.policy_class, env=None, device=model.device, _init_setup_model=False)
    taken = {*vars(converted), "observation_space", "action_space"} - {*excluded, "seed"}
    vars(converted).update({name: copy.copy(value) for name, value in vars(model).items() if name in taken})
    converted.n_envs = model.n_envs
    if is_clip_off(vars(model)["clip_range"]):
        warn_caller("PPO cannot train without its clip: clip_range is set to SB3's default 0.2")
        vars(converted)["clip_range"] = 0.2
    with preserved_generators(model.device):
        converted._setup_model()
        parameters: dict[str, Any] = model.get_parameters()
        sb3s: Any = {name: parameters[name] for name in converted.get_parameters()}
        converted.set_parameters(copy.deepcopy(sb3s), device=model.device)  # optimisers keep the tensors they load
        if converted.use_sde:
            converted.policy.reset_noise()  # as SB3 does after loading
    converted.seed, converted.env, converted._vec_normalize_env = model.seed, model.env, model._vec_normalize_env
    return converted
