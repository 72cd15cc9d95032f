"""``save()``, ``load()`` and their relatives for the algorithms of this package, as methods of SB3's interface."""

import io
import pathlib
from collections.abc import Iterable
from typing import Any, ClassVar, TypeVar, cast

import torch as th
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.save_util import open_path, recursive_getattr
from stable_baselines3.common.type_aliases import GymEnv, TensorDict

from sb3_ppo_ewma._arguments import CLIP_OFF, warn_caller
from sb3_ppo_ewma._parallel.process_group import DataParallelChoice, SharedInCopies, place
from sb3_ppo_ewma._rules import check_given_to_load
from sb3_ppo_ewma.checkpointing.atomic import replace_atomically, with_default_suffix
from sb3_ppo_ewma.checkpointing.conversion import CLIP_OFF_IN_FILE, convert_to_sb3, copy_to_save
from sb3_ppo_ewma.checkpointing.generators import CollectorGenerators, GeneratorStates
from sb3_ppo_ewma.checkpointing.model_files import (
    check_archive,
    check_reader_of_tensors,
    check_sizes,
    in_memory,
    name_of,
    naming_file,
    read_attributes,
    read_objects,
    read_variable_names,
)
from sb3_ppo_ewma.checkpointing.own_states import (
    Differences,
    Snapshot,
    StateDict,
    append_own_states,
    check_loaded,
    load_own_states,
    own_state_dicts,
    parameters_digest,
    present_attributes,
    read_own_states,
    split_parameters,
)
from sb3_ppo_ewma.checkpointing.rollout_files import (
    KeptRollouts,
    OtherSizeError,
    RolloutPath,
    Step,
    read_rollouts,
    write_rollouts,
)
from sb3_ppo_ewma.checkpointing.state_checks import DamagedStateError
from sb3_ppo_ewma.networks import with_features_extractor

SelfSavedState = TypeVar("SelfSavedState", bound="SavedStateMixin")

# Own states that are loaded after all others
_LAST = ("generators", "collector_generators")
_NOTHING_KEPT = "The model keeps no rollouts between iterations (staleness=0 and no auxiliary phase)"


class SavedStateMixin(OnPolicyAlgorithm):
    """
    Saves the states that an algorithm has beside those of the SB3 algorithm it extends. Files of that algorithm load
    too, and that algorithm loads the files of this one. A family adds its own names to the class attributes.
    """

    generators: GeneratorStates
    collector_generators: CollectorGenerators
    # Number of rollouts that train() was called for, saved with the other attributes
    _n_rollouts = 0

    # Names of the attributes with own states, in the model and in the saved file. An attribute may be None.
    _own_states: ClassVar[tuple[str, ...]] = ("generators", "collector_generators")
    # Names of the own states that start without a warning when a file lacks them, and that each process has for itself
    _silent_states: ClassVar[frozenset[str]] = frozenset({"generators", "collector_generators"})
    # Names of the attributes with rollouts that are kept between iterations. An attribute may be None.
    _own_buffers: ClassVar[tuple[str, ...]] = ()

    # Own states of the file that load() reads, which SB3 does not hand to set_parameters()
    _states_in_file: dict[str, StateDict] | None = None
    # Names of tensors outside of modules in that file
    _variables_in_file: tuple[str, ...] = ()
    # The number of environments that the hyper-parameters are for
    tuned_for_n_envs: int | None = None
    # Hyper-parameters as tuned, and what they are for the present number of environments; None: nothing is rescaled
    tuned_hyperparameters: dict[str, Any] | None = None
    fitted_hyperparameters: dict[str, Any] | None = None
    # Which processes train this model together
    data_parallel: DataParallelChoice = None
    # Names of the attributes that load() was given
    _given_to_load: tuple[str, ...] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Of several mixins, each has its own.
        for attribute in ("_own_states", "_own_buffers"):
            names = [name for base in reversed(cls.__mro__) for name in vars(base).get(attribute, ())]
            setattr(cls, attribute, tuple(dict.fromkeys(names)))

    @classmethod
    def _sb3_class(cls) -> type[OnPolicyAlgorithm]:
        """
        :return: the algorithm this is mixed into: PPO, RecurrentPPO, ...
        """
        bases = (base for base in cls.__mro__ if issubclass(base, OnPolicyAlgorithm))
        return next(base for base in bases if not issubclass(base, SavedStateMixin))

    def _setup_model(self) -> None:
        # load(..., clip_range=None) bypasses the constructor.
        if vars(self).get("clip_range", CLIP_OFF) in (None, CLIP_OFF_IN_FILE):
            vars(self)["clip_range"] = CLIP_OFF
        super()._setup_model()
        self.generators = GeneratorStates(self.device)
        self.collector_generators = CollectorGenerators()

    def _setup_learn(self, *args: Any, **kwargs: Any) -> Any:
        self.generators.apply_pending()
        return super()._setup_learn(*args, **kwargs)

    def set_random_seed(self, seed: int | None = None) -> None:
        """
        Seed the random number generators and the environments, instead of the states that :meth:`load` read. In a
        data-parallel training the environments get the seeds that they would have in a single process.

        :param seed: seed of rank 0; ``None`` does nothing
        """
        super().set_random_seed(None if seed is None else seed + place(self.data_parallel).rank * self.n_envs)
        if seed is not None and "generators" in vars(self):
            self.generators.drop_pending()
            self.collector_generators.drop()

    def __getstate__(self) -> dict[str, Any]:
        attributes = {name: value for name, value in vars(self).items() if name != "_data_parallel"}
        if attributes.get("_collector") is not None:
            attributes["_collector"] = attributes["_collector"].in_copies()
        return {**attributes, "data_parallel": SharedInCopies(self.data_parallel)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({**state, "data_parallel": state["data_parallel"].data_parallel})

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), *self._own_states, *self._own_buffers]

    def get_parameters(self) -> dict[str, StateDict]:
        """
        Return the parameters as in SB3, with the own states of this class but those of the run itself, as random number
        generators, which only files have.

        :return: state dictionaries by name
        """
        names = [name for name in self._own_states if name not in self._silent_states]
        return {**own_state_dicts(self, names), **super().get_parameters()}

    def set_parameters(
        self,
        load_path_or_dict: str | TensorDict,
        exact_match: bool = True,
        device: th.device | str = "auto",
    ) -> None:
        """
        Load parameters from a file or a dictionary, as in SB3. States that only this class has may be missing (in a
        file of plain PPO, or after a change of ``prox_decay``): they start afresh from the loaded policy, with a
        warning. States that the model does not use are dropped, with a warning. If an error is raised, nothing has
        changed. A file is read without running code from it.

        :param load_path_or_dict: file, or dictionary as from :meth:`get_parameters`
        :param exact_match: whether all of SB3's parameters must be there
        :param device: device of the loaded tensors
        :raises ValueError: if the file is damaged, parameters are not finite or the state of an optimiser cannot be one
        :raises RuntimeError: if parameters are missing or have other shapes
        """
        with naming_file(cast(Any, load_path_or_dict)):
            differences = self._load_parameters(load_path_or_dict, exact_match, device)
        message = differences.message(self._silent_states)
        if exact_match and message:
            warn_caller(message)

    def _load_parameters(
        self, load_path_or_dict: str | TensorDict, exact_match: bool, device: th.device | str
    ) -> Differences:
        sb3s, own = split_parameters(cast(Any, load_path_or_dict), _names_of_own_states(SavedStateMixin), device)
        own = {**(self._states_in_file or {}), **own}
        unknown = set(self._variables_in_file) - set(self._get_torch_save_params()[1])
        if unknown:
            raise DamagedStateError(f"tensors {sorted(unknown)}, which the model does not have")
        parts = self._parts_to_load()
        check_loaded(parts, {**sb3s, **own})
        # Generators are loaded last and check for themselves. load() drops the model if it fails.
        snapshot = Snapshot({} if self._states_in_file is not None else parts)
        try:
            super().set_parameters(cast(TensorDict, sb3s), exact_match=exact_match, device=device)
            names = sorted(self._own_states, key=lambda name: name in _LAST)
            return load_own_states(
                present_attributes(self, names),
                own,
                policy=self.policy,
                exact_match=exact_match,
                is_policy_loaded="policy" in sb3s,
            )
        except BaseException:
            snapshot.restore()
            raise

    def _parts_to_load(self) -> dict[str, Any]:
        names = [name for name in self._own_states if name not in _LAST]
        sb3s = {name: recursive_getattr(self, name) for name in self._get_torch_save_params()[0]}
        return {**present_attributes(self, names), **{n: getattr(part, "_orig_mod", part) for n, part in sb3s.items()}}

    @classmethod
    def load(
        cls: type[SelfSavedState],
        path: str | pathlib.Path | io.BufferedIOBase,
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        *,
        safe: bool = False,
        **kwargs: Any,
    ) -> SelfSavedState:
        """
        Load a model that this class or the SB3 algorithm it extends has saved. The next call of ``learn()`` restores
        the random number generators, unless you give ``seed``.

        :param path: file name or open file
        :param env: environment for training; ``None``: predict only
        :param device: device of the model
        :param custom_objects: replacements for saved attributes, by name
        :param print_system_info: whether to print the systems of saving and loading
        :param force_reset: whether to reset the environment before training
        :param safe: run no code from the file: of its objects, take those on a list of known classes, and refuse the
            file if it has others that ``custom_objects`` does not replace
        :param kwargs: attributes to change
        :return: the model
        :raises TypeError: for an unknown attribute or one of the wrong type
        :raises ValueError: for a value out of its range, with ``env`` also for one in the file; if the file is damaged,
            is not a saved model or is not ``safe``, parameters are not finite, or the state of an optimiser cannot be
            one
        """
        if not isinstance(safe, bool):
            raise TypeError(f"safe must be True or False, got {safe!r}")
        source = in_memory(path) if safe else path
        check_archive(source, name_of(path))
        with naming_file(path):
            attributes = read_attributes(source)
            check_given_to_load(cls, env, device, kwargs, attributes)
            if kwargs.get("policy_kwargs"):
                kwargs["policy_kwargs"] = with_features_extractor(kwargs["policy_kwargs"])
            if safe:
                check_reader_of_tensors()
                check_sizes(cast(io.BytesIO, source))
                given = dict(custom_objects or {})
                custom_objects = {**read_objects(cls, attributes, given), **given}  # SB3 reads no pickles of these
            changes = {
                **kwargs,
                "_states_in_file": read_own_states(source),
                "_variables_in_file": read_variable_names(source),
                "_given_to_load": tuple(kwargs),
            }
            model = super().load(source, env, device, custom_objects, print_system_info, force_reset, **changes)
        del model._states_in_file, model._variables_in_file, model._given_to_load
        if kwargs.get("seed") is not None:
            model.generators.drop_pending()
            model.collector_generators.drop()
        return model

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """
        Save the model to a zip file, as in SB3, which ``PPO.load`` (``RecurrentPPO.load``, ``MaskablePPO.load``) reads
        too. A file name is written atomically: if the process is killed, the old file stays as it was.

        :param path: file name (``.zip`` is added if it has no suffix) or open binary file
        :param exclude: attributes that are not saved, in addition to SB3's choice
        :param include: attributes that are saved, against SB3's choice
        """
        own = own_state_dicts(self, self._own_states)
        save_as_sb3 = super(SavedStateMixin, copy_to_save(self, self._own_states)).save
        if isinstance(path, str | pathlib.Path):
            with replace_atomically(with_default_suffix(path, ".zip")) as file:
                save_as_sb3(file, exclude, include)
                append_own_states(file, own)
            return
        target = open_path(path, "w")
        archive = io.BytesIO()  # the target need not be readable, as it must be to append to it
        save_as_sb3(archive, exclude, include)
        append_own_states(archive, own)
        target.write(archive.getbuffer())

    @property
    def replay_buffer(self) -> dict[str, KeptRollouts] | None:
        """
        SB3's ``CheckpointCallback`` reads this attribute.

        :return: the rollouts that :meth:`save_replay_buffer` writes, by name; ``None`` if the model keeps none
        """
        return present_attributes(self, self._own_buffers) or None

    def save_replay_buffer(self, path: RolloutPath) -> None:
        """
        Save the rollouts that are kept from one iteration to the next, with the step they belong to.

        :param path: file name (``.pkl`` is added if it has no suffix) or open binary file; in a data-parallel training,
            ranks above 0 add theirs to the name
        """
        if self.replay_buffer is None:
            warn_caller(f"{_NOTHING_KEPT}: nothing was saved")
            return
        write_rollouts(path, self._step, self.replay_buffer, place(self.data_parallel), self._facts_of_run())

    def load_replay_buffer(self, path: RolloutPath, truncate_last_traj: bool = True) -> None:
        """
        Load the rollouts that are kept from one iteration to the next. Nothing in the file is run.

        :param path: file that :meth:`save_replay_buffer` wrote at the same step as the model
        :param truncate_last_traj: has no effect; part of SB3's interface
        :raises ValueError: if the file is damaged, belongs to another run or step, or does not fit the model; with
            ``tuned_for_n_envs``, rollouts of another size, as another number of environments has them, are left out
            with a warning instead
        """
        if self.replay_buffer is None:
            warn_caller(f"{_NOTHING_KEPT}: the file was not read")
            return
        own, facts = place(self.data_parallel), self._facts_of_run()
        try:
            kept = read_rollouts(path, self._step, self.replay_buffer, self.rollout_buffer, own, facts)
            vars(self).update(kept)
        except OtherSizeError as error:
            if self.tuned_for_n_envs is None:
                raise
            warn_caller(f"Rollouts of another number of environments are not read: {error}")

    @property
    def _step(self) -> Step:
        return Step(self.num_timesteps, self._n_rollouts)

    def _facts_of_run(self) -> dict[str, Any]:
        """
        :return: what kept rollouts must have in common with the model, beside the step. The policy's parameters tell
            apart what became of one file in several runs
        """
        facts = {"algorithm": type(self).__name__, "policy": parameters_digest(self.policy)}
        facts |= {name: str(getattr(self, name)) for name in ("observation_space", "action_space")}
        returns = {name: float(getattr(self, name)) for name in ("gamma", "gae_lambda")}
        return {**facts, **returns, **{name: int(getattr(self, name)) for name in ("n_steps", "n_envs")}}

    def to_ppo(self) -> OnPolicyAlgorithm:
        """
        Convert the model to the plain SB3 algorithm, with the same policy, optimiser, hyper-parameters, counters and
        environment. The new model is independent of this one; it has no moving average, advantage moments, value
        optimiser or waiting rollouts.

        :return: ``PPO`` (for the other families ``RecurrentPPO``, ``MaskablePPO``)
        """
        return convert_to_sb3(self, self._sb3_class(), self._excluded_save_params())


def _names_of_own_states(cls: type[SavedStateMixin]) -> set[str]:
    """
    :param cls: class of algorithms
    :return: names of the own states of this class and of those derived from it
    """
    return set(cls._own_states).union(*map(_names_of_own_states, cls.__subclasses__()))
