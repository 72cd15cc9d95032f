"""One file that is a whole run: ``save_checkpoint()`` and ``load_checkpoint()``."""

import contextlib
import json
import pathlib
import weakref
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_ewma._arguments import warn_caller
from sb3_ppo_ewma._parallel.process_group import place
from sb3_ppo_ewma.checkpointing.atomic import replace_atomically, with_default_suffix
from sb3_ppo_ewma.checkpointing.environment_states import environments_state, restore_environments
from sb3_ppo_ewma.checkpointing.generators import seed_from
from sb3_ppo_ewma.checkpointing.own_states import parameters_digest
from sb3_ppo_ewma.checkpointing.plain_data import NotPlainError, dumps, loads
from sb3_ppo_ewma.checkpointing.rollout_in_progress import Collection, RolloutInProgress
from sb3_ppo_ewma.checkpointing.saving import SavedStateMixin

SelfResumable = TypeVar("SelfResumable", bound="ResumableMixin")

_FORMAT = 1
# Members of the zip archive beside those of save()
_FOLDER = "sb3_ppo_ewma_checkpoint/"
_MANIFEST, _ROLLOUTS = f"{_FOLDER}checkpoint.json", f"{_FOLDER}rollouts"
_IN_PROGRESS, _ENVIRONMENTS, _CALLBACKS = (f"{_FOLDER}{name}" for name in ("in_progress", "environments", "callbacks"))


class ResumableMixin(SavedStateMixin):
    """Saves and continues a run as it stands, in the middle of episodes and rollouts."""

    env: Any

    # Steps before the present rollout; None between rollouts
    _rollout_start: int | None = None
    # The rollout that is being collected in this process
    _collection: Collection | None = None
    # The rollout that the loaded run was in the middle of
    _in_progress: RolloutInProgress | None = None
    # Writes a checkpoint, at the next moment that is in order
    _due_checkpoint: Callable[[], None] | None = None
    # Callbacks, which hold the model, with what they held when training began; what a loaded run had changed of it
    _callbacks: tuple[tuple["weakref.ref[BaseCallback]", dict[str, bytes]], ...] = ()
    _callback_states: list[Any] | None = None
    _continues_run = False

    @property
    def remaining_timesteps(self) -> int:
        """
        :return: steps left of the ``total_timesteps`` that ``learn()`` was last called with, as a run that was loaded
            with :meth:`load_checkpoint` needs: ``model.learn(model.remaining_timesteps, reset_num_timesteps=False)``
        """
        return max(0, self._total_timesteps - self.num_timesteps)

    def save_checkpoint(self, path: str | pathlib.Path, variables: dict[str, Any] | None = None) -> None:
        """
        Save the run: all that :meth:`save` and :meth:`save_replay_buffer` save, the state of the environments with
        statistics of ``VecNormalize``, the rollout in progress, and what callbacks have counted. Also in a callback.
        Environments that cannot give their state begin new episodes in a run that continues; the file says why.

        The file is a zip as of :meth:`save`, which :meth:`load` and SB3's ``load`` read too. It is written atomically.

        :param path: file name (``.zip`` is added if it has no suffix); in a data-parallel training, each rank writes
            its own, those above 0 with the rank in the name
        :param variables: local variables of ``collect_rollouts`` in the present step, ``None``: those that the
            callback has
        :raises ValueError: in the middle of a rollout with ``max_policy_lag``, ``collect="as_ready"`` or in a
            data-parallel training
        """
        if self._rollout_start not in (None, self.num_timesteps) and not self.can_save_within_rollout:
            raise ValueError(
                "save_checkpoint() in the middle of a rollout needs collection in this process alone, without "
                "max_policy_lag, collect='as_ready' and data_parallel: call it between rollouts"
            )
        progress = None if self._collection is None else self._collection.in_progress(variables)
        environments = None if self.env is None else environments_state(self.env, self._has_collector())
        manifest = {
            "format": _FORMAT,
            "algorithm": type(self).__name__,
            "num_timesteps": self.num_timesteps,
            "total_timesteps": self._total_timesteps,
            "n_processes": place(self.data_parallel).n_processes,
            "parameters": parameters_digest(self.policy),
            "new_episodes": "" if environments is None else environments["reason"],
        }
        target = checkpoint_of_rank(with_default_suffix(path, ".zip"), place(self.data_parallel).rank)
        with replace_atomically(target) as temporary:
            self.save(temporary)
            with zipfile.ZipFile(temporary, "a") as archive:
                if self.replay_buffer is not None:
                    with archive.open(_ROLLOUTS, "w", force_zip64=True) as member:
                        self.save_replay_buffer(cast(Any, member))
                archive.writestr(_ENVIRONMENTS, dumps(environments))
                archive.writestr(_IN_PROGRESS, dumps(progress))
                archive.writestr(_CALLBACKS, dumps(self._callback_changes()))
                archive.writestr(_MANIFEST, json.dumps(manifest))

    @classmethod
    def load_checkpoint(
        cls: type[SelfResumable],
        path: str | pathlib.Path,
        env: GymEnv,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> SelfResumable:
        """
        Load a run. It goes on as if it had not been interrupted, with the same numbers to the bit, if the environments
        could give their state; a warning says what begins anew.

        .. code-block:: python

            model = PPOEWMA.load_checkpoint("run.zip", env)
            model.learn(model.remaining_timesteps, callback, reset_num_timesteps=False)

        :param path: file of :meth:`save_checkpoint`
        :param env: environments like those of the run, wrapped as they were; their state is replaced
        :param device: device of the model
        :param custom_objects: as in :meth:`load`
        :param kwargs: as in :meth:`load`
        :return: the model
        :raises ValueError: if the file is not a checkpoint or damaged, or the environments are wrapped otherwise
        """
        if env is None:
            raise ValueError("load_checkpoint() needs env, got None; load() reads the file to predict only")
        path = with_default_suffix(path, ".zip")
        first, own_place = read_manifest(path), place(kwargs.get("data_parallel"))
        is_own = first["n_processes"] == own_place.n_processes
        own = checkpoint_of_rank(path, own_place.rank if is_own else 0)
        read_manifest(own)
        model = cls.load(own, env, device, custom_objects, force_reset=False, **kwargs)
        with zipfile.ZipFile(own) as archive:
            if _ROLLOUTS in archive.namelist() and is_own:
                with archive.open(_ROLLOUTS) as member:
                    model.load_replay_buffer(cast(Any, member))
            states, progress, callbacks = (
                loads(archive.read(name)) for name in (_ENVIRONMENTS, _IN_PROGRESS, _CALLBACKS)
            )
        model._callback_states = callbacks
        if progress is not None:
            model._in_progress = RolloutInProgress(progress, model)
        model._continue_episodes(states)
        return model

    def _continue_episodes(self, states: dict[str, Any]) -> None:
        seed = seed_from(self.generators.pending or self.generators.state_dict(), "environments of a resumed run")
        observations, reason = restore_environments(self.env, states, seed)
        progress = self._in_progress
        if progress is not None and not progress.fits(self.rollout_buffer):
            self._in_progress, reason = None, reason or "n_steps has changed"
            warn_caller("The rollout in progress is dropped: rollouts have another size now")
        if not reason:
            return
        warn_caller(f"The environments begin new episodes: {reason}")
        if self._in_progress is not None:
            self._in_progress.cut_episodes(observations)
        else:
            self._last_obs = observations
            self._last_episode_starts = np.ones(self.env.num_envs, dtype=bool)

    # ------------------------------------------------------------------ moments that are in order

    @property
    def can_save_within_rollout(self) -> bool:
        """
        :return: whether :meth:`save_checkpoint` can be called in the middle of a rollout
        """
        attributes = vars(self)
        is_plain = attributes.get("collect") == "together" and not self._has_collector()
        return is_plain and attributes.get("_data_parallel") is None

    def _has_collector(self) -> bool:
        return vars(self).get("_collector") is not None

    @contextlib.contextmanager
    def within_rollout(self) -> Iterator[None]:
        """Context in which a rollout is collected or taken from another process."""
        self._write_due_checkpoint()
        self._rollout_start = self.num_timesteps
        try:
            yield
        finally:
            self._rollout_start = None

    def checkpoint_at_next_moment(self, write: Callable[[], None]) -> None:
        """
        :param write: is called once, at the end of the step if :attr:`can_save_within_rollout`, else before the next
            rollout
        """
        self._due_checkpoint = write

    def _write_due_checkpoint(self) -> None:
        due, self._due_checkpoint = self._due_checkpoint, None
        if due is not None:
            due()

    def collect_rollouts(self, env: Any, callback: Any, rollout_buffer: Any, *args: Any, **kwargs: Any) -> bool:
        """
        As in the algorithm this is mixed into; a rollout that a loaded run was in the middle of goes on.

        :param env: the training environments
        :param callback: called at every step
        :param rollout_buffer: buffer to fill
        :param args: further arguments of the algorithm's method
        :param kwargs: further arguments of the algorithm's method
        :return: False when a callback ended the collection
        """
        own = super().collect_rollouts
        self._collection = Collection(self, callback, rollout_buffer)
        try:
            if self._in_progress is not None:
                return self._in_progress.collect(own, env, callback, rollout_buffer, *args, **kwargs)
            return own(env, callback, rollout_buffer, *args, **kwargs)
        finally:
            self._collection = self._in_progress = None

    def _update_info_buffer(self, infos: list[dict[str, Any]], dones: np.ndarray | None = None) -> None:
        # Called by all algorithms after the callbacks of a step
        progress = self._in_progress
        if progress is not None and self._collection is not None and not progress.is_over:
            if not progress.continues(self._collection.buffer):
                return
        elif self._due_checkpoint is not None and self.can_save_within_rollout:
            self._write_due_checkpoint()
        super()._update_info_buffer(infos, dones)

    # ------------------------------------------------------------------ learn()

    def continue_run(self) -> None:
        """
        Let the next ``learn()`` go on with the run up to the number of steps that it was meant to have, whatever
        arguments ``learn()`` gets for that.
        """
        self._continues_run = True

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if self._continues_run:
            total_timesteps, reset_num_timesteps, self._continues_run = self.remaining_timesteps, False, False
        if self._in_progress is not None and reset_num_timesteps:
            warn_caller("The rollout in progress is dropped: learn(..., reset_num_timesteps=False) would continue it")
            self._in_progress = self._callback_states = self._last_obs = None
        self._due_checkpoint = None
        return super()._setup_learn(total_timesteps, callback, reset_num_timesteps, *args, **kwargs)

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        result = super()._init_callback(callback, progress_bar)
        callbacks = list(_callbacks_in(result))
        self._callbacks = tuple((weakref.ref(each), _plain_attributes(each)) for each in callbacks)
        states, self._callback_states = self._callback_states, None
        if states is not None:
            _restore_callbacks(callbacks, states)
        return result

    def _callback_changes(self) -> list[dict[str, Any]]:
        present = [(reference(), before) for reference, before in self._callbacks]
        return [_changes(callback, before) for callback, before in present if callback is not None]

    def __getstate__(self) -> dict[str, Any]:
        # What belongs to the learn() that goes on, which a copy is not in the middle of
        own = ("_rollout_start", "_collection", "_due_checkpoint", "_callbacks")
        return {name: value for name, value in super().__getstate__().items() if name not in own}

    def _excluded_save_params(self) -> list[str]:
        own = ("_rollout_start", "_collection", "_in_progress", "_due_checkpoint", "_continues_run")
        return [*super()._excluded_save_params(), *own, "_callbacks", "_callback_states"]


# === Callbacks ===


def _callbacks_in(callback: BaseCallback) -> Iterator[BaseCallback]:
    """
    :param callback: a callback
    :return: it and those that it calls
    """
    yield callback
    for value in vars(callback).values():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, BaseCallback) and each is not callback and each is not vars(callback).get("parent"):
                yield from _callbacks_in(each)


def _plain_attributes(callback: BaseCallback) -> dict[str, bytes]:
    found = {}
    for name, value in vars(callback).items():
        try:
            found[name] = dumps(value) if name not in ("locals", "globals") else b""
        except (NotPlainError, TypeError):  # objects, which belong to the process
            continue
    return {name: data for name, data in found.items() if data}


def _changes(callback: BaseCallback, before: dict[str, bytes]) -> dict[str, Any]:
    """
    :param callback: a callback
    :param before: what it held when training began
    :return: name of its class; attributes that have changed, so that they are not its settings; its environments
    """
    now = _plain_attributes(callback)
    return {
        "class": type(callback).__name__,
        "attributes": {name: data for name, data in now.items() if before.get(name) != data},
        "environments": {name: environments_state(env, False) for name, env in _environments(callback).items()},
    }


def _environments(callback: BaseCallback) -> dict[str, VecEnv]:
    return {name: value for name, value in vars(callback).items() if isinstance(value, VecEnv)}


def _restore_callbacks(callbacks: list[BaseCallback], states: list[dict[str, Any]]) -> None:
    """
    :param callbacks: those of the training that continues
    :param states: from :func:`_changes`, each for the first callback of its class that has none yet
    """
    waiting = list(callbacks)
    for state in states:
        callback = next((each for each in waiting if type(each).__name__ == state["class"]), None)
        if callback is None:
            continue
        waiting.remove(callback)
        for name, data in state["attributes"].items():
            setattr(callback, name, loads(data))
        for name, env in _environments(callback).items():
            with contextlib.suppress(ValueError):  # evaluation may use other ones now
                if not state["environments"].get(name, {"reason": "new"})["reason"]:
                    restore_environments(env, state["environments"][name], seed=0)


# === Files ===


def checkpoint_of_rank(path: pathlib.Path, rank: int) -> pathlib.Path:
    """
    :param path: file of rank 0
    :param rank: number of a process of a data-parallel training
    :return: its file
    """
    return path if rank == 0 else path.with_name(f"{path.stem}.rank{rank}{path.suffix}")


def read_manifest(path: pathlib.Path) -> dict[str, Any]:
    """
    :param path: a file
    :return: what stands at the beginning of a checkpoint
    :raises ValueError: if it is not one
    """
    try:
        with zipfile.ZipFile(path) as archive:
            manifest: dict[str, Any] = json.loads(archive.read(_MANIFEST))
    except (zipfile.BadZipFile, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged or not a file of save_checkpoint(): {error}") from error
    if manifest.get("format") != _FORMAT:
        raise ValueError(f"{path} has the format {manifest.get('format')!r}, this version reads {_FORMAT}")
    return manifest


def is_whole(path: pathlib.Path) -> bool:
    """
    :param path: a file
    :return: whether it is a checkpoint, complete and undamaged, with the files of all ranks
    """
    try:
        first = read_manifest(path)
        for rank in range(first["n_processes"]):
            own = checkpoint_of_rank(path, rank)
            if read_manifest(own)["parameters"] != first["parameters"]:  # left by a run that was killed here
                return False
            with zipfile.ZipFile(own) as archive:
                if archive.testzip() is not None:
                    return False
    except (ValueError, OSError, zipfile.BadZipFile):
        return False
    return True
