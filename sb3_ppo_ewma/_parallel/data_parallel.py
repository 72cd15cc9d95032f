"""
Data-parallel training. Each process collects with its own environments and trains on its own samples; the processes
share gradients, statistics, logs and the decision to stop.
"""

import contextlib
import inspect
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, cast

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
from stable_baselines3.common.type_aliases import MaybeCallback

from sb3_ppo_ewma._parallel.normalization import Statistics, pooled, set_statistics, statistics_of
from sb3_ppo_ewma._parallel.process_group import ProcessGroup, check_data_parallel, check_equal

# Constructor arguments that may differ between processes
_LOCAL_ARGUMENTS = {"env", "policy", "seed", "verbose", "device", "tensorboard_log", "data_parallel",
                    "_init_setup_model"}  # fmt: skip
# Log keys that training writes, and those pooled by their maximum instead of their mean
_TRAINING_KEYS = ("train/", "aux/")
_MAXIMA = {"train/importance_ratio_max"}
# Callbacks that only rank 0 runs
_RANK_0_CALLBACKS = (EvalCallback, CheckpointCallback, ProgressBarCallback)


class DataParallel:
    """
    This process's part in a data-parallel training. All processes must build the same model and make the same call of
    ``learn``.

    :param model: the model of this process
    :param group: all processes
    :raises ValueError: if ``max_policy_lag`` and ``VecNormalize`` are combined
    """

    def __init__(self, model: Any, group: ProcessGroup) -> None:
        if model.max_policy_lag and model.get_vec_normalize_env() is not None:
            raise ValueError(
                f"max_policy_lag={model.max_policy_lag} cannot be combined with data-parallel VecNormalize, "
                "whose statistics are pooled after every rollout, when the next ones have begun. Use max_policy_lag=0"
            )
        self.group = group
        self._model = model
        self._callbacks: RankCallbacks | None = None
        # Running statistics when they were last equal in all processes
        self._statistics: Statistics | None = None
        self._episodes: list[dict[str, Any]] = []
        self._successes: list[float] = []

    @classmethod
    def start(cls, model: Any) -> "DataParallel | None":
        """
        :param model: the model of this process
        :return: its part in the training, ``None`` where it trains alone
        :raises ValueError: if ``max_policy_lag`` and ``VecNormalize`` are combined
        """
        group = ProcessGroup.of(model.data_parallel)
        return None if group is None else cls(model, group)

    def setup_learn(
        self,
        setup_learn: Callable[..., tuple[int, BaseCallback]],
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        """
        Give all processes the state of rank 0, and let only rank 0 write, evaluate and save.

        :param setup_learn: the algorithm's ``_setup_learn``, called with the other arguments
        :param total_timesteps: number of environment steps, counted over all processes
        :param callback: called at every step of this process
        :param reset_num_timesteps: whether to count steps from 0
        :param tb_log_name: name of the run for tensorboard
        :param progress_bar: show a progress bar, in rank 0
        :return: number of environment steps at which training ends; the callbacks of this process
        :raises ValueError: in every process, if settings or arguments differ
        """
        model = self._model
        arguments = {"total_timesteps": total_timesteps, "reset_num_timesteps": reset_num_timesteps}
        self.group.check_same({**_shared_settings(model), **arguments})
        self._load_state_of_first()
        has_custom_logger = model._custom_logger
        if self.group.rank > 0:
            callback, progress_bar = callback_of_rank(callback), False
            model.set_logger(Logger(folder=None, output_formats=[]))
        try:
            end, initialized = setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)
        finally:
            model._custom_logger = has_custom_logger
        self._callbacks = RankCallbacks(initialized, self.group)
        self._callbacks.init_callback(model)
        return end, self._callbacks

    def _load_state_of_first(self) -> None:
        model, group = self._model, self.group
        model.generators.apply_pending()
        parameters = model.get_parameters()
        for name in model._silent_states:  # each process keeps its own
            parameters.pop(name, None)
        parameters = group.from_first(parameters)
        if group.rank > 0:
            model.set_parameters(parameters, device=model.device)
        kept_rollouts = model.replay_buffer or {}
        n_kept = [len(buffer) for buffer in kept_rollouts.values()]
        if any(others != n_kept for others in group.gather(n_kept)):
            # A process lost its rollouts, and all must train on the same number.
            for buffer in kept_rollouts.values():
                buffer.clear()
        venv = model.get_vec_normalize_env()
        if venv is not None:
            self._statistics = group.from_first(statistics_of(venv))
            set_statistics(venv, self._statistics)
        group.seed_generators_apart()

    def pool_rollouts(self, continues: bool) -> bool:
        """
        Pool running statistics and the logged episodes, and stop all processes if one has to stop. To be called when
        this process has collected a rollout.

        :param continues: False if a callback of this process ended the collection
        :return: False if a callback of any process did
        :raises ValueError: in every process, if a callback has changed settings in some of them
        """
        model, venv = self._model, self._model.get_vec_normalize_env()
        report: dict[str, Any] = {
            "continues": continues and not cast(RankCallbacks, self._callbacks).wants_to_stop,
            "episodes": list(model.ep_info_buffer),
            "successes": list(model.ep_success_buffer),
            "statistics": None if venv is None else statistics_of(venv),
            "settings": _shared_settings(model),
        }
        reports = self.group.gather(report)
        check_equal([each["settings"] for each in reports])
        self._episodes = [episode for each in reports for episode in each["episodes"]]
        self._successes = [success for each in reports for success in each["successes"]]
        if venv is not None and self._statistics is not None:
            self._statistics = pooled(self._statistics, [each["statistics"] for each in reports])
            set_statistics(venv, self._statistics)
        return all(each["continues"] for each in reports)

    def end_training(self) -> None:
        """
        Give all processes the same buffers of the policy, and the same log. To be called after every training.

        :raises ValueError: in every process, if integers in the buffers differ
        """
        self._share_buffers()
        self._pool_log()

    def _share_buffers(self) -> None:
        """
        Floating-point buffers, as BatchNorm's running statistics, become their means over the processes: each has seen
        its part of the samples, and with momentum the mean of running means is the running mean of them all. The
        variance leaves out that between the means of the processes, as the minibatches do: each process normalises its
        own. Integers, as BatchNorm's number of minibatches, count what all processes have done alike, so that a
        difference is an error.
        """
        buffers = dict(self._model.policy.named_buffers())
        floats = [each for each in buffers.values() if each.is_floating_point()]
        if floats:
            self.group.average(floats)
        others = {name: each.tolist() for name, each in buffers.items() if not each.is_floating_point()}
        if others:
            self.group.check_same({f"buffer {name!r} of the policy": values for name, values in others.items()})

    def _pool_log(self) -> None:
        """Replace what training has logged by its mean over all processes, or its maximum."""
        record = self._model.logger.name_to_value
        logged = {
            name: value
            for name, value in record.items()
            if name.startswith(_TRAINING_KEYS) and isinstance(value, float | np.floating)
        }
        by_rank = self.group.gather(logged)
        for name in logged:
            values = [float(each[name]) for each in by_rank if name in each]
            record[name] = max(values) if name in _MAXIMA else float(np.mean(values))

    @contextlib.contextmanager
    def pooled_episodes(self) -> Iterator[None]:
        """Within this context, the model's buffers of episodes have those of all processes."""
        model = self._model
        buffers = model.ep_info_buffer, model.ep_success_buffer
        model.ep_info_buffer, model.ep_success_buffer = deque(self._episodes), deque(self._successes)
        try:
            yield
        finally:
            model.ep_info_buffer, model.ep_success_buffer = buffers


@contextlib.contextmanager
def reporting_errors(model: Any) -> Iterator[None]:
    """
    An error within this context ends the training in all processes.

    :param model: a model that is about to learn
    :raises TypeError: if its ``data_parallel`` has the wrong type
    :raises ValueError: if that asks for a process group that is not there, or that this process does not belong to
    """
    check_data_parallel(model.data_parallel)
    group = ProcessGroup.of(model.data_parallel)
    if group is None:
        yield
        return
    group.begin_learning()
    try:
        yield
    except BaseException as error:
        group.report(error)
        raise


def _shared_settings(model: Any) -> dict[str, Any]:
    """
    :param model: the model of this process
    :return: by name, the settings that must be equal in all processes, or they would wait for each other for ever
    """
    names = inspect.signature(type(model)).parameters.keys() - _LOCAL_ARGUMENTS
    arguments = {name: getattr(model, name, None) for name in names}
    simple = {name: each for name, each in arguments.items() if isinstance(each, int | float | str | None)}
    venv, parameters = model.get_vec_normalize_env(), dict(model.policy.named_parameters())
    return {
        "algorithm": type(model).__name__,
        "n_envs": model.n_envs,
        "num_timesteps": model.num_timesteps,
        "optimizer": type(model.policy.optimizer).__name__,
        "VecNormalize": None if venv is None else sorted(statistics_of(venv)),
        **{f"shape of the policy's {name}": tuple(each.shape) for name, each in parameters.items()},
        **{f"requires_grad of the policy's {name}": each.requires_grad for name, each in parameters.items()},
        **simple,
    }


# === Callbacks ===


class RankCallbacks(CallbackList):
    """
    The callbacks of one process. Adds the steps of the other processes to ``num_timesteps``. When a callback wants to
    stop, collects the rollout to its end, where all processes stop. Stops at once if another process has failed.

    :param callback: the callbacks of this process, initialised
    :param group: all processes
    """

    def __init__(self, callback: BaseCallback, group: ProcessGroup) -> None:
        super().__init__([callback])
        self._group = group
        self.wants_to_stop = False

    def _init_callback(self) -> None:
        pass  # CallbackList would initialise the callbacks again

    def _on_step(self) -> bool:
        self._group.check_others()
        self.model.num_timesteps += (self._group.size - 1) * self.training_env.num_envs
        self.num_timesteps = self.model.num_timesteps
        if not self.wants_to_stop:
            self.wants_to_stop = not super()._on_step()
        return True

    def _on_rollout_end(self) -> None:
        if not self.wants_to_stop:
            super()._on_rollout_end()


class _KeptRolloutsCheckpoint(CheckpointCallback):
    """Saves the kept rollouts of a rank above 0, beside the checkpoints that rank 0 writes."""

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
    :return: the callbacks among them that a rank above 0 runs
    """
    if isinstance(callback, list):
        return [cast(BaseCallback, each) for each in map(callback_of_rank, callback) if each is not None]
    if isinstance(callback, CallbackList):
        return CallbackList(cast(list[BaseCallback], callback_of_rank(callback.callbacks)))
    if isinstance(callback, CheckpointCallback) and callback.save_replay_buffer:
        return _KeptRolloutsCheckpoint(callback.save_freq, callback.save_path, callback.name_prefix)
    if isinstance(callback, _RANK_0_CALLBACKS) or getattr(callback, "rank_0_only", False):
        return None
    if isinstance(callback, EventCallback) and callback.callback is not None:
        callback.callback = cast(BaseCallback | None, callback_of_rank(callback.callback))
    return callback
