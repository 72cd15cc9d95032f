"""Saving and loading of what an algorithm has beyond the SB3 algorithm it extends."""

import copy
import io
import pathlib
import warnings
from collections.abc import Iterable
from typing import Any, ClassVar, TypeVar, cast

import torch as th
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.type_aliases import GymEnv, TensorDict

from sb3_ppo_ewma._arguments import is_clip_off
from sb3_ppo_ewma.checkpointing.atomic import replace_atomically, with_default_suffix
from sb3_ppo_ewma.checkpointing.generators import GeneratorStates, preserved_generators
from sb3_ppo_ewma.checkpointing.rollout_files import KeptRollouts, RolloutPath, Step, read_rollouts, write_rollouts
from sb3_ppo_ewma.networks import with_features_extractor

SelfSavedState = TypeVar("SelfSavedState", bound="SavedStateMixin")

_NOTHING_KEPT = "The model keeps no rollouts between iterations (staleness=0 and no auxiliary phase)"


class SavedStateMixin(OnPolicyAlgorithm):
    """
    Names its own parts of the state in ``_own_states``; they go into SB3's file beside SB3's, and files without them
    (those of the plain algorithm) load too. The state of the random number generators is one of them.
    """

    generators: GeneratorStates
    # Number of times that train() was called, saved with the other attributes
    _n_rollouts = 0

    # By attribute and, at the same time, by name in the saved file. An attribute that is None is not saved.
    _own_states: ClassVar[tuple[str, ...]] = ("generators",)
    # Those whose absence from a file changes nothing a user would want to know about
    _silent_states: ClassVar[frozenset[str]] = frozenset({"generators"})
    # Those that are derived from the policy and have to start afresh whenever another policy is put in without them
    _policy_states: ClassVar[frozenset[str]] = frozenset()
    # Own states of all classes: a file may come from one that has more of them.
    _known_states: ClassVar[set[str]] = set()
    # By attribute, the rollouts that are kept from one iteration to the next. An attribute that is None keeps none.
    _own_buffers: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        SavedStateMixin._known_states.update(cls._own_states)

    @classmethod
    def _sb3_class(cls) -> type[OnPolicyAlgorithm]:
        """
        :return: the algorithm this is mixed into: PPO, RecurrentPPO, ...
        """
        bases = (base for base in cls.__mro__ if issubclass(base, OnPolicyAlgorithm))
        return next(base for base in bases if not issubclass(base, SavedStateMixin))

    def _setup_model(self) -> None:
        super()._setup_model()
        self.generators = GeneratorStates(self.device)

    def _setup_learn(self, *args: Any, **kwargs: Any) -> Any:
        self.generators.apply_pending()
        return super()._setup_learn(*args, **kwargs)

    def set_random_seed(self, seed: int | None = None) -> None:
        """
        Seed the generators; what :meth:`load` kept of their state is dropped.

        :param seed: ``None`` does nothing
        """
        super().set_random_seed(seed)
        if seed is not None and "generators" in vars(self):
            self.generators.pending = None

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), *self._own_states, *self._own_buffers]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        names, variables = super()._get_torch_save_params()
        return [*(name for name in self._own_states if getattr(self, name) is not None), *names], variables

    def set_parameters(
        self,
        load_path_or_dict: str | TensorDict,
        exact_match: bool = True,
        device: th.device | str = "auto",
    ) -> None:
        """
        Load parameters from a file or a dictionary, as in SB3. Parts that only this class has may be missing (in a file
        of plain PPO, or after a change of ``prox_decay``): they start afresh from the loaded policy, with a warning;
        parts that are no longer needed are dropped, with a warning.

        :param load_path_or_dict: file, or dictionary as from ``get_parameters``
        :param exact_match: whether SB3's own parts must all be there
        :param device: device of the loaded tensors
        """
        if isinstance(load_path_or_dict, dict):
            params: dict[str, Any] = dict(load_path_or_dict)
        else:
            params = dict(load_from_zip_file(load_path_or_dict, device=device, load_data=False)[1])
        needed = [name for name in self._own_states if getattr(self, name) is not None]
        missing = [name for name in needed if name not in params]
        surplus = [name for name in params if name in self._known_states and name not in needed]
        for name in surplus:
            del params[name]
        if exact_match:
            params |= {name: getattr(self, name).state_dict() for name in missing}
        pending = self.generators.pending
        super().set_parameters(params, exact_match=exact_match, device=device)
        if "generators" in missing:
            self.generators.pending = pending
        for name in missing:
            if exact_match or (name in self._policy_states and "policy" in params):
                self._start_afresh(name)
        started = [name for name in missing if name not in self._silent_states]
        messages = []
        if started:
            messages.append(f"without {', '.join(started)}: started afresh from the loaded policy")
        if surplus:
            messages.append(f"with {', '.join(surplus)}, which this model does not use: dropped")
        if exact_match and messages:
            warnings.warn(f"Loaded parameters {'; '.join(messages)}.", stacklevel=2)

    def _start_afresh(self, name: str) -> None:
        """
        Start an own part that loaded parameters do not have anew, from the policy that they do have.

        :param name: of the part
        """

    @classmethod
    def load(
        cls: type[SelfSavedState],
        path: str | pathlib.Path | io.BufferedIOBase,
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **kwargs: Any,
    ) -> SelfSavedState:
        """
        Load a model saved by this class or by the SB3 algorithm it extends. The state of the random number generators
        is restored when training goes on, unless ``seed`` is given: then that seed holds.

        :param path: file name or open file
        :param env: environment to go on with; ``None``: predict only
        :param device: device of the model
        :param custom_objects: replacements for saved attributes, by name
        :param print_system_info: whether to print the systems of saving and loading
        :param force_reset: whether the environment is reset before training
        :param kwargs: attributes to change
        :return: the model
        """
        if kwargs.get("policy_kwargs"):
            kwargs["policy_kwargs"] = with_features_extractor(kwargs["policy_kwargs"])
        model = super().load(path, env, device, custom_objects, print_system_info, force_reset, **kwargs)
        if kwargs.get("seed") is not None:
            model.generators.pending = None
        return model

    @property
    def replay_buffer(self) -> dict[str, KeptRollouts] | None:
        """
        :return: by name, the rollouts that :meth:`save_replay_buffer` writes, ``None`` if the model keeps none. SB3's
            ``CheckpointCallback`` asks for it
        """
        buffers = {name: getattr(self, name) for name in self._own_buffers}
        return {name: buffer for name, buffer in buffers.items() if buffer is not None} or None

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """
        Save everything to a zip file, as in SB3. Atomic when ``path`` is a file name: a run that is killed leaves the
        old file whole.

        :param path: file name (``.zip`` is added where there is no suffix) or open binary file
        :param exclude: attributes that are not saved beside SB3's choice
        :param include: attributes that are saved against SB3's choice
        """
        if not isinstance(path, str | pathlib.Path):
            super().save(path, exclude, include)
            return
        with replace_atomically(with_default_suffix(path, ".zip")) as temporary:
            super().save(temporary, exclude, include)

    def _step(self) -> Step:
        return Step(self.num_timesteps, self._n_rollouts)

    def save_replay_buffer(self, path: RolloutPath) -> None:
        """
        Save the rollouts that are kept from one iteration to the next, with the step they belong to.

        :param path: file name (``.pkl`` is added where there is no suffix) or open binary file
        """
        if self.replay_buffer is None:
            warnings.warn(f"{_NOTHING_KEPT}: nothing was saved", stacklevel=2)
            return
        write_rollouts(path, self._step(), self.replay_buffer)

    def load_replay_buffer(self, path: RolloutPath, truncate_last_traj: bool = True) -> None:
        """
        Load the rollouts that are kept from one iteration to the next. The file is a pickle: load only what you trust.

        :param path: what :meth:`save_replay_buffer` wrote at the same step as the model
        :param truncate_last_traj: has no meaning here; part of SB3's interface
        :raises ValueError: if the file belongs to another step or does not fit the model
        """
        if self.replay_buffer is None:
            warnings.warn(f"{_NOTHING_KEPT}: the file was not read", stacklevel=2)
            return
        loaded = read_rollouts(path, self._step(), self.replay_buffer, self.rollout_buffer)
        for name, buffer in loaded.items():
            setattr(self, name, buffer)

    def to_ppo(self) -> OnPolicyAlgorithm:
        """
        Hand the trained model back as the plain SB3 algorithm: same policy, optimiser, hyper-parameters, counters and
        environment, independent of this model. EWMA, moments, a separate value optimiser and waiting rollouts stay
        behind.

        :return: ``PPO`` (for the other families ``RecurrentPPO``, ``MaskablePPO``)
        """
        create: Any = self._sb3_class()
        model: OnPolicyAlgorithm = create(self.policy_class, env=None, device=self.device, _init_setup_model=False)
        taken = {*vars(model), "observation_space", "action_space"} - {*self._excluded_save_params(), "seed"}
        vars(model).update({name: copy.copy(value) for name, value in vars(self).items() if name in taken})
        model.n_envs = self.n_envs
        if is_clip_off(vars(self)["clip_range"]):
            warnings.warn("PPO cannot train without its clip: clip_range is set to SB3's default 0.2", stacklevel=2)
            vars(model)["clip_range"] = 0.2
        with preserved_generators(self.device):
            model._setup_model()
            model.policy.load_state_dict(uncompiled(self.policy).state_dict())
            if model.use_sde:
                model.policy.reset_noise()  # as SB3 does after loading
        model.policy.optimizer.load_state_dict(copy.deepcopy(self.policy.optimizer.state_dict()))
        model.seed, model.env, model._vec_normalize_env = self.seed, self.env, self._vec_normalize_env
        return model


def uncompiled(module: th.nn.Module) -> th.nn.Module:
    """
    :param module: a module, or the result of ``torch.compile`` for it, whose parameters have other names
    :return: the module
    """
    return cast(th.nn.Module, getattr(module, "_orig_mod", module))
