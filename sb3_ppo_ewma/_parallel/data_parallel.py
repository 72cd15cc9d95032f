"""
Data-parallel training. Each process collects with environments of its own and trains on its own samples; gradients,
statistics, logs and the wish to stop are those of all.
"""

import inspect
import pathlib
from collections import deque
from typing import Any, ClassVar, cast

import numpy as np
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    EventCallback,
    ProgressBarCallback,
)
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.type_aliases import MaybeCallback, TensorDict

from sb3_ppo_ewma._parallel.asynchronous import AsyncMixin
from sb3_ppo_ewma._parallel.normalization import Statistics, pooled, set_statistics, statistics_of
from sb3_ppo_ewma._parallel.process_group import Ranks, rank
from sb3_ppo_ewma.checkpointing.rollout_files import RolloutPath

# Arguments of a constructor that may differ from process to process
_OF_EACH_RANK = {"env", "policy", "seed", "verbose", "device", "tensorboard_log", "_init_setup_model"}
# What the log says of a training, and where it is not the mean of what all processes found
_TRAINING = ("train/", "aux/")
_LARGEST = {"train/importance_ratio_max"}
# Of these, the first process has all that is needed.
_OF_FIRST_RANK = (EvalCallback, CheckpointCallback, ProgressBarCallback)


class DataParallelMixin(AsyncMixin):
    """
    Trains together with the other processes when the default process group of ``torch.distributed`` is initialised
    and has several. All of them must be built alike, and the same ``learn`` must be called in each.
    """

    # While this process is one of several
    _ranks: Ranks | None = None
    # Of the environments when all processes had the same
    _statistics: Statistics | None = None
    _rank_callbacks: "RankCallbacks | None" = None
    # Information on episodes and successes of all processes
    _episodes: tuple[list[dict[str, Any]], list[float]] = ([], [])

    _of_process: ClassVar[tuple[str, ...]] = ("_ranks", "_statistics", "_rank_callbacks", "_episodes")

    def set_random_seed(self, seed: int | None = None) -> None:
        """
        Seed the generators and environments. Those of several processes get the seeds that the environments of a
        single one would have.

        :param seed: of the first process; ``None`` does nothing
        """
        super().set_random_seed(seed if seed is None else seed + rank() * self.n_envs)

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        self._ranks = self._statistics = self._rank_callbacks = None
        ranks = Ranks.joined()
        is_custom = self._custom_logger
        if ranks is not None:
            if self.async_rollouts is not None:
                raise ValueError(
                    f"async_rollouts={self.async_rollouts} cannot be combined with data-parallel training: use "
                    "async_rollouts=None in several processes"
                )
            same = {"total_timesteps": total_timesteps, "reset_num_timesteps": reset_num_timesteps}
            ranks.check_same({**self._settings(), **same})
            self._take_state_of_first(ranks)
            self._ranks = ranks
            if ranks.rank > 0:
                self.set_logger(Logger(folder=None, output_formats=[]))
        try:
            result: tuple[int, BaseCallback] = super()._setup_learn(
                total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar
            )
        finally:
            self._custom_logger = is_custom
        return result

    def _settings(self) -> dict[str, Any]:
        """
        :return: by name, what must be the same in all processes, or they would wait for each other
        """
        names = inspect.signature(type(self)).parameters.keys() - _OF_EACH_RANK
        arguments = {name: getattr(self, name, None) for name in names}
        simple = {name: each for name, each in arguments.items() if isinstance(each, int | float | str | None)}
        return {
            "algorithm": type(self).__name__,
            "n_envs": self.n_envs,
            "num_timesteps": self.num_timesteps,
            "policy": {name: tuple(each.shape) for name, each in self.policy.named_parameters()},
            "VecNormalize": None if self._vec_normalize_env is None else sorted(statistics_of(self._vec_normalize_env)),
            **simple,
        }

    def _take_state_of_first(self, ranks: Ranks) -> None:
        self.generators.apply_pending()
        parameters = self.get_parameters()
        for name in self._silent_states:  # a process's own
            parameters.pop(name, None)
        parameters = ranks.from_first(parameters)
        if ranks.rank > 0:
            self.set_parameters(cast(TensorDict, parameters), device=self.device)
        kept = [len(buffer) for buffer in (self.replay_buffer or {}).values()]
        if any(others != kept for others in ranks.gather(kept)):
            # Those of some process are missing, and all are to have the same.
            for name in self.replay_buffer or {}:
                getattr(self, name).clear()
        if self._vec_normalize_env is not None:
            self._statistics = ranks.from_first(statistics_of(self._vec_normalize_env))
            set_statistics(self._vec_normalize_env, self._statistics)
        ranks.part_generators()

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        if self._ranks is None:
            return super()._init_callback(callback, progress_bar)
        if self._ranks.rank > 0:
            callback = callback_of_rank(callback)
            progress_bar = False
        self._rank_callbacks = RankCallbacks(super()._init_callback(callback, progress_bar), self._ranks)
        self._rank_callbacks.init_callback(self)
        return self._rank_callbacks

    def collect_rollouts(self, *args: Any, **kwargs: Any) -> bool:
        """
        As in the algorithm this is mixed into. Several processes then agree on statistics, and on whether to go on.

        :param args: see there
        :param kwargs: see there
        :return: False when a callback ended the collection, in several processes one of any of them
        """
        continues = super().collect_rollouts(*args, **kwargs)
        return continues if self._ranks is None else self._agree(self._ranks, continues)

    def _agree(self, ranks: Ranks, continues: bool) -> bool:
        callbacks, venv = cast(RankCallbacks, self._rank_callbacks), self._vec_normalize_env
        report: dict[str, Any] = {
            "continues": continues and not callbacks.wants_to_stop,
            "episodes": list(self.ep_info_buffer or []),
            "successes": list(self.ep_success_buffer or []),
            "statistics": None if venv is None else statistics_of(venv),
        }
        reports = ranks.gather(report)
        episodes = [each for one in reports for each in one["episodes"]]
        self._episodes = episodes, [each for one in reports for each in one["successes"]]
        if venv is not None and self._statistics is not None:
            self._statistics = pooled(self._statistics, [one["statistics"] for one in reports])
            set_statistics(venv, self._statistics)
        return all(one["continues"] for one in reports)

    def _pool_log(self) -> None:
        """
        To be called when training has logged its own: the log is that of all processes then.
        """
        if self._ranks is None:
            return
        record = self.logger.name_to_value
        own = {
            name: value
            for name, value in record.items()
            if name.startswith(_TRAINING) and isinstance(value, float | np.floating)
        }
        by_rank = self._ranks.gather(own)
        for name in own:
            values = [logged[name] for logged in by_rank if name in logged]
            record[name] = float(max(values) if name in _LARGEST else np.mean(values))

    def dump_logs(self, iteration: int = 0) -> None:
        """
        Write the log; its episodes are those of all processes.

        :param iteration: number of rollouts so far
        """
        own = self.ep_info_buffer, self.ep_success_buffer
        if self._ranks is not None:
            episodes, successes = self._episodes
            self.ep_info_buffer, self.ep_success_buffer = deque(episodes), deque(successes)
        try:
            super().dump_logs(iteration)
        finally:
            self.ep_info_buffer, self.ep_success_buffer = own

    def save_replay_buffer(self, path: RolloutPath) -> None:
        """
        Save the rollouts that are kept from one iteration to the next, with the step they belong to.

        :param path: file name (``.pkl`` is added where there is no suffix) or open binary file; another process than
            the first adds its rank to a name
        """
        super().save_replay_buffer(_path_of_rank(path))

    def load_replay_buffer(self, path: RolloutPath, truncate_last_traj: bool = True) -> None:
        """
        Load the rollouts that are kept from one iteration to the next. The file is a pickle: load only what you trust.

        :param path: as for :meth:`save_replay_buffer`, at the same step as the model
        :param truncate_last_traj: has no meaning here; part of SB3's interface
        :raises ValueError: if the file belongs to another step or does not fit the model
        """
        super().load_replay_buffer(_path_of_rank(path), truncate_last_traj)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), *self._of_process]


def _path_of_rank(path: RolloutPath) -> RolloutPath:
    if rank() == 0 or not isinstance(path, str | pathlib.Path):
        return path
    path = pathlib.Path(path)
    return path.with_name(f"{path.stem}.rank{rank()}{path.suffix or '.pkl'}")


# === Callbacks ===


class RankCallbacks(CallbackList):
    """
    The callbacks of one process. Counts the steps of all processes, and keeps a callback's wish to stop until the
    rollout is complete, when all learn of it.

    :param callback: of this process
    :param ranks: all processes
    """

    def __init__(self, callback: BaseCallback, ranks: Ranks) -> None:
        super().__init__([callback])
        self._n_others = ranks.size - 1
        self.wants_to_stop = False

    def _init_callback(self) -> None:
        pass  # what is in it has been initialised

    def _on_step(self) -> bool:
        self.model.num_timesteps += self._n_others * self.training_env.num_envs
        self.num_timesteps = self.model.num_timesteps
        if not self.wants_to_stop:
            self.wants_to_stop = not super()._on_step()
        return True

    def _on_rollout_end(self) -> None:
        if not self.wants_to_stop:
            super()._on_rollout_end()


class _KeptRolloutsCheckpoint(CheckpointCallback):
    """What another process than the first adds to a checkpoint: the rollouts that it keeps."""

    def _init_callback(self) -> None:
        pass

    def _on_step(self) -> bool:
        if self.n_calls % self.save_freq == 0 and self.model.replay_buffer is not None:  # type: ignore[attr-defined]
            self.model.save_replay_buffer(  # type: ignore[attr-defined]
                self._checkpoint_path("replay_buffer_", extension="pkl")
            )
        return True


def callback_of_rank(callback: MaybeCallback) -> MaybeCallback:
    """
    :param callback: as for ``learn``
    :return: what of it runs in other processes than the first
    """
    if isinstance(callback, list):
        return [cast(BaseCallback, each) for each in map(callback_of_rank, callback) if each is not None]
    if isinstance(callback, CallbackList):
        return CallbackList(cast(list[BaseCallback], callback_of_rank(callback.callbacks)))
    if isinstance(callback, CheckpointCallback) and callback.save_replay_buffer:
        return _KeptRolloutsCheckpoint(callback.save_freq, callback.save_path, callback.name_prefix)
    if isinstance(callback, _OF_FIRST_RANK) or getattr(callback, "rank_0_only", False):
        return None
    if isinstance(callback, EventCallback) and callback.callback is not None:
        callback.callback = cast(BaseCallback | None, callback_of_rank(callback.callback))
    return callback
