"""Checkpoints from which a run goes on as if it had not been interrupted."""

import re
from pathlib import Path
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback

from sb3_ppo_ewma._arguments import check_integer, warn_caller
from sb3_ppo_ewma._parallel.process_group import place
from sb3_ppo_ewma.checkpointing.run_checkpoint import ResumableMixin, checkpoint_of_rank, is_whole

_NAME = re.compile(r"checkpoint_(\d+)_steps\.zip")


def newest_checkpoint(folder: str | Path) -> Path | None:
    """
    :param folder: folder of :class:`RunCheckpoint`
    :return: the newest checkpoint that is complete and undamaged, with the files of all ranks; ``None`` without one
    """
    return next((path for path in reversed(_checkpoints(Path(folder))) if is_whole(path)), None)


class RunCheckpoint(BaseCallback):
    """
    Writes the whole run to a file from time to time, and where training ends. An older file is removed when a newer one
    is complete.

    .. code-block:: python

        model.learn(1_000_000, RunCheckpoint("run", every=50_000))
        # after a crash
        model = PPOEWMA.load_checkpoint(newest_checkpoint("run"), env)
        model.learn(model.remaining_timesteps, RunCheckpoint("run", every=50_000), reset_num_timesteps=False)

    If a file cannot be written, a warning says so, and training goes on. With ``max_policy_lag``,
    ``collect="as_ready"`` or several processes, it waits for the end of a rollout.

    :param folder: where to write ``checkpoint_N_steps.zip``
    :param every: environment steps between two checkpoints, at least 1
    :param keep: number of files to keep, at least 1
    :param verbose: 1: print the name of each file
    :raises ValueError: if ``every`` or ``keep`` is below 1
    """

    def __init__(self, folder: str | Path, every: int, keep: int = 2, verbose: int = 0) -> None:
        super().__init__(verbose)
        check_integer("every", every, minimum=1)
        check_integer("keep", keep, minimum=1)
        self.folder, self.every, self.keep = Path(folder), every, keep
        self._variables: dict[str, Any] | None = None
        self._last = 0

    def _init_callback(self) -> None:
        if not isinstance(self.model, ResumableMixin):
            raise TypeError(f"RunCheckpoint needs an algorithm of sb3_ppo_ewma, got {type(self.model).__name__}")
        self.folder.mkdir(parents=True, exist_ok=True)

    def update_locals(self, locals_: dict[str, Any]) -> None:
        """
        :param locals_: local variables of the loop, before any callback has changed them
        """
        self._variables = locals_
        super().update_locals(locals_)

    def _on_training_start(self) -> None:
        # A run that goes on begins with the rollout that its checkpoint was in the middle of.
        self._last = max(self._last, self.model.num_timesteps) if self.model.num_timesteps > 0 else 0

    def _on_step(self) -> bool:
        if self.num_timesteps // self.every > self._last // self.every:
            self._model.checkpoint_at_next_moment(self._write)
        return True

    def _on_training_end(self) -> None:
        if self._last != self.model.num_timesteps:
            self._variables = None
            self._write()

    @property
    def _model(self) -> ResumableMixin:
        return self.model  # type: ignore[return-value]

    def _write(self) -> None:
        self._last = self.model.num_timesteps
        path = self.folder / f"checkpoint_{self._last}_steps.zip"
        try:
            self._model.save_checkpoint(path, self._variables)
        except OSError as error:  # as of a full disk
            warn_caller(f"The run could not be saved to {path}: {error}. Training goes on")
            return
        if self.verbose >= 1:
            print(f"Saved the run to {path}")
        self._remove_old(path)

    def _remove_old(self, newest: Path) -> None:
        n_processes = place(self._model.data_parallel).n_processes
        if not all(checkpoint_of_rank(newest, rank).exists() for rank in range(n_processes)):
            return  # another process has yet to write its file
        older = [path for path in _checkpoints(self.folder) if path != newest]
        for path in older[: max(0, len(older) - self.keep + 1)]:
            for file in self.folder.glob(f"{path.stem}*{path.suffix}"):
                file.unlink(missing_ok=True)


def _checkpoints(folder: Path) -> list[Path]:
    """
    :param folder: a folder
    :return: the files of rank 0 in it, oldest first
    """
    found = [(match, path) for path in folder.glob("*.zip") if (match := _NAME.fullmatch(path.name))]
    return [path for match, path in sorted(found, key=lambda each: int(each[0][1]))]
