"""
``torchrun ... -m sb3_ppo_ewma.zoo train``: train one model in several processes. ``n_envs`` and ``batch_size`` are
totals over all processes; only the first process writes files.
"""

import contextlib
import functools
import os
import sys
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch as th
import torch.distributed as dist
from rl_zoo3 import exp_manager
from rl_zoo3.exp_manager import ExperimentManager

from sb3_ppo_ewma._parallel.process_group import ProcessGroup, place
from sb3_ppo_ewma.batch_scaling import per_process, with_defaults
from sb3_ppo_ewma.zoo.algorithms import ALGORITHMS
from sb3_ppo_ewma.zoo.patches._replace import AnyFunction, replace_function


@functools.cache  # once
def install_hooks() -> None:
    """Divide the work of an ``ExperimentManager`` between processes. With one process, nothing changes."""
    replace_function(ExperimentManager, "__init__", _init)
    replace_function(ExperimentManager, "read_hyperparameters", _read_hyperparameters)
    replace_function(ExperimentManager, "create_log_folder", _create_log_folder)
    replace_function(ExperimentManager, "_save_config", _save_config)
    replace_function(ExperimentManager, "save_trained_model", _save_trained_model)
    replace_function(exp_manager, "make_vec_env", _make_vec_env)


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """
    Within the context, the processes that ``torchrun`` started form a process group, and only the first one prints.
    """
    if not dist.is_torchelastic_launched() or int(os.environ["WORLD_SIZE"]) == 1 or dist.is_initialized():
        yield
        return
    if th.cuda.is_available():
        th.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()  # Gloo for tensors on a CPU, NCCL for CUDA
    try:
        with contextlib.ExitStack() as stack:
            if place().rank > 0:
                sys.argv = [each for each in sys.argv if each != "--track"]
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
            yield
    finally:
        dist.destroy_process_group()


def _init(upstream: AnyFunction, manager: Any, *args: Any, **kwargs: Any) -> None:
    upstream(manager, *args, **kwargs)
    group = ProcessGroup.of()
    if group is None:
        return
    if manager.algo not in ALGORITHMS:
        raise ValueError(f"{manager.algo} cannot train in several processes, only {', '.join(ALGORITHMS)} can")
    if manager.optimize_hyperparameters:
        raise ValueError("-optimize needs no torchrun: processes that have the same --storage share a search")
    # Each process looked for the next free run number: use the one that the first process found.
    manager.save_path, manager.params_path, manager.seed = group.from_first(
        (manager.save_path, manager.params_path, manager.seed)
    )
    if group.rank > 0:
        manager.tensorboard_log, manager.show_progress, manager.verbose = None, False, 0
        manager.eval_freq = manager.save_freq = -1
    # Upstream divides by n_envs of this process only.
    manager.eval_freq, manager.save_freq = (
        max(frequency // group.size, 1) if frequency > 0 else frequency
        for frequency in (manager.eval_freq, manager.save_freq)
    )


def _read_hyperparameters(upstream: AnyFunction, manager: Any) -> tuple[dict[str, Any], OrderedDict[str, Any]]:
    hyperparams, saved = upstream(manager)
    if place().n_processes == 1:
        return hyperparams, saved
    if hyperparams.get("data_parallel") is False:
        raise ValueError("data_parallel=False cannot be combined with torchrun, whose processes train one model")
    known = with_defaults(ALGORITHMS[manager.algo], hyperparams)
    if known.get("tuned_for_n_envs") is not None:  # the model divides the others
        parts = per_process({"n_envs": known["n_envs"], "batch_size": None}, place().n_processes)
        return {**hyperparams, "n_envs": parts["n_envs"]}, saved
    parts = per_process({name: known[name] for name in ("n_envs", "batch_size")} | hyperparams, place().n_processes)
    return parts, saved


def _create_log_folder(upstream: AnyFunction, manager: Any) -> None:
    if place().rank == 0:
        upstream(manager)
    group = ProcessGroup.of()
    if group is not None:
        # The first process may have found another number. The others write their episode statistics there.
        manager.save_path, manager.params_path = group.from_first((manager.save_path, manager.params_path))


def _save_config(upstream: AnyFunction, manager: Any, saved_hyperparams: dict[str, Any]) -> None:
    if place().rank == 0:
        upstream(manager, saved_hyperparams)


def _save_trained_model(upstream: AnyFunction, manager: Any, model: Any) -> None:
    if place().rank == 0:
        upstream(manager, model)
    elif manager.save_replay_buffer and model.replay_buffer is not None:
        model.save_replay_buffer(os.path.join(manager.save_path, "replay_buffer.pkl"))


def _make_vec_env(upstream: AnyFunction, *args: Any, **kwargs: Any) -> Any:
    # Evaluation environments have no monitor_dir.
    if place().rank > 0 and kwargs.get("monitor_dir") is not None:
        kwargs["start_index"] = place().rank * kwargs["n_envs"]
    return upstream(*args, **kwargs)
