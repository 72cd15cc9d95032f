"""
``--checkpoint-every N`` writes the whole run from time to time; ``--resume`` goes on with the run that the same command
has begun, or begins it.
"""

import functools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rl_zoo3.exp_manager import ExperimentManager
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_ppo_ewma._arguments import check_integer
from sb3_ppo_ewma._parallel.process_group import ProcessGroup, place
from sb3_ppo_ewma.callbacks.run_checkpoint import RunCheckpoint, newest_checkpoint
from sb3_ppo_ewma.checkpointing.atomic import replace_atomically
from sb3_ppo_ewma.envs.env_state import EnvStateWrapper
from sb3_ppo_ewma.zoo import options, signals
from sb3_ppo_ewma.zoo.algorithms import ALGORITHMS
from sb3_ppo_ewma.zoo.patches._replace import AnyFunction, replace_function

_DEFAULT_EVERY = 50_000
_FOLDER, _RUN = "checkpoints", "run.json"
# Options that do not change what a run learns, with their numbers of values
_WITHOUT_EFFECT = {"--verbose": 1, "--device": 1, "--progress": 0, "-P": 0, "--checkpoint-every": 1}


class _CheckpointOnSignal(RunCheckpoint):
    """Also saves the run when a signal comes, and ends training then."""

    def _on_training_start(self) -> None:
        super()._on_training_start()
        signals.current.is_held = signals.current.is_installed

    def _on_step(self) -> bool:
        result = super()._on_step()
        if signals.current.is_held and signals.current.received is not None:
            self._model.checkpoint_at_next_moment(self._write_and_stop)
        return result

    def _write_and_stop(self) -> None:
        signals.current.is_held = False
        self._write()
        signals.current.check()


@functools.cache  # once
def install_hooks() -> None:
    """Let ``ExperimentManager`` write checkpoints and go on from them, if the options ask for it."""
    replace_function(ExperimentManager, "__init__", _init)
    replace_function(ExperimentManager, "create_log_folder", _create_log_folder)
    replace_function(ExperimentManager, "create_callbacks", _create_callbacks)
    replace_function(ExperimentManager, "create_envs", _create_envs)
    replace_function(ExperimentManager, "_load_pretrained_agent", _load_pretrained_agent)
    replace_function(ExperimentManager, "save_trained_model", _save_trained_model)


def _is_on() -> bool:
    return options.current.resume or options.current.checkpoint_every is not None


def _init(upstream: AnyFunction, manager: Any, *args: Any, **kwargs: Any) -> None:
    upstream(manager, *args, **kwargs)
    manager.resumed_from, manager.has_found_run = None, False
    if not _is_on():
        return
    if options.current.checkpoint_every is not None:
        check_integer("--checkpoint-every", options.current.checkpoint_every, minimum=1)
    if manager.algo not in ALGORITHMS:
        raise ValueError(f"--checkpoint-every and --resume are for {', '.join(ALGORITHMS)}, got {manager.algo}")
    if manager.optimize_hyperparameters:
        raise ValueError(
            "--checkpoint-every and --resume are not for -optimize: a search goes on with the same --storage"
        )
    if manager.trained_agent:
        raise ValueError("--resume finds the run by itself: leave out -i, or --resume and --checkpoint-every")
    if options.current.resume:
        _find_run(manager)


def _find_run(manager: Any) -> None:
    """
    :param manager: the zoo's ``ExperimentManager``, which gets the folder and seed of the run that it goes on with
    """
    group = ProcessGroup.of()
    found = _newest_run(manager) if group is None or group.rank == 0 else (None, 0, None)
    folder, seed, checkpoint = found if group is None else group.from_first(found)
    if folder is None:
        return
    manager.save_path, manager.seed, manager.has_found_run = folder, seed, True
    manager.params_path = f"{folder}/{manager.env_name}"
    manager.resumed_from = checkpoint
    manager.continue_training = checkpoint is not None
    if checkpoint is not None:
        # Upstream empties the files of episodes otherwise.
        manager.monitor_kwargs = {**manager.monitor_kwargs, "override_existing": False}
        print(f"Resuming from {checkpoint}")


def _newest_run(manager: Any) -> tuple[str | None, int, str | None]:
    """
    :param manager: the zoo's ``ExperimentManager``
    :return: folder of the newest run of this command, its seed, its newest checkpoint; ``None`` without one
    """
    for folder in _folders(Path(manager.log_path), manager.env_name):
        try:
            run = json.loads((folder / _FOLDER / _RUN).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if run["arguments"] != _arguments(sys.argv[1:]):
            continue
        if run["is_complete"]:
            print(f"{folder} is complete: there is nothing to resume. Without --resume, the command begins another run")
            sys.exit(0)
        checkpoint = newest_checkpoint(folder / _FOLDER)
        return str(folder), run["seed"], None if checkpoint is None else str(checkpoint)
    return None, 0, None


def _folders(log_path: Path, env_name: str) -> Iterator[Path]:
    numbered = []
    for folder in log_path.glob(f"{env_name}_[0-9]*"):
        number = folder.name.removeprefix(f"{env_name}_").partition("_")[0]
        if number.isdigit() and folder.is_dir():
            numbered.append((int(number), folder))
    yield from (folder for _, folder in sorted(numbered, reverse=True))


def _arguments(given: Sequence[str]) -> list[str]:
    """
    :param given: arguments of the script, without those of this package
    :return: those that a run depends on
    """
    result, rest = [], list(given)
    while rest:
        argument = rest.pop(0)
        name = argument.partition("=")[0]
        if name not in _WITHOUT_EFFECT:
            result.append(argument)
        elif "=" not in argument:
            del rest[: _WITHOUT_EFFECT[name]]
    own = {name: value for name, value in vars(options.current).items() if name not in ("resume", "checkpoint_every")}
    return [*result, json.dumps(own, sort_keys=True, default=str)]


def _create_log_folder(upstream: AnyFunction, manager: Any) -> None:
    if not manager.has_found_run:
        upstream(manager)
    if _is_on() and place().rank == 0:
        folder = Path(manager.save_path) / _FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        _write_run(folder, manager.seed, is_complete=False)


def _write_run(folder: Path, seed: int, is_complete: bool) -> None:
    run = {"arguments": _arguments(sys.argv[1:]), "seed": seed, "is_complete": is_complete}
    with replace_atomically(folder / _RUN) as file:
        file.write_text(json.dumps(run, indent=1), encoding="utf-8")


def _create_callbacks(upstream: AnyFunction, manager: Any) -> None:
    upstream(manager)
    if _is_on():
        every = options.current.checkpoint_every or _DEFAULT_EVERY
        manager.callbacks.append(_CheckpointOnSignal(Path(manager.save_path) / _FOLDER, every, verbose=manager.verbose))


def _create_envs(upstream: AnyFunction, manager: Any, *args: Any, **kwargs: Any) -> Any:
    # upstream(n_envs, eval_env=False, no_log=False)
    is_for_training = not (kwargs.get("eval_env", False) or args[1:2] == (True,))
    if not _is_on() or not is_for_training or manager.vec_env_class is DummyVecEnv:
        return upstream(manager, *args, **kwargs)
    wrapper = manager.env_wrapper
    manager.env_wrapper = functools.partial(_wrapped, wrapper)
    try:
        return upstream(manager, *args, **kwargs)
    finally:
        manager.env_wrapper = wrapper


def _wrapped(wrapper: Any, env: Any) -> Any:
    return EnvStateWrapper(env if wrapper is None else wrapper(env))


def _load_pretrained_agent(upstream: AnyFunction, manager: Any, hyperparams: dict[str, Any], env: Any) -> Any:
    if manager.resumed_from is None:
        return upstream(manager, hyperparams, env)
    settings = {"tensorboard_log": manager.tensorboard_log, "verbose": manager.verbose}
    algorithm: Any = ALGORITHMS[manager.algo]
    model = algorithm.load_checkpoint(manager.resumed_from, env, manager.device, **settings)
    model.continue_run()
    _forget_later_episodes(Path(manager.save_path), model.env)
    return model


def _forget_later_episodes(folder: Path, env: Any) -> None:
    """
    Cut the files of episodes where the checkpoint was written: the run makes what came after it again.

    :param folder: of the run
    :param env: training environments; if they began anew, the files stay as they are
    """
    for index in range(env.num_envs):
        file = folder / f"{place().rank * env.num_envs + index}.monitor.csv"
        if not file.is_file() or not env.has_attr("get_episode_rewards"):
            continue
        [rewards] = env.env_method("get_episode_rewards", indices=[index])
        lines = file.read_bytes().splitlines(keepends=True)
        if rewards:
            os.truncate(file, sum(map(len, lines[: 2 + len(rewards)])))


def _save_trained_model(upstream: AnyFunction, manager: Any, model: Any) -> None:
    upstream(manager, model)
    if _is_on() and place().rank == 0 and model.num_timesteps >= model._total_timesteps:
        _write_run(Path(os.path.join(manager.save_path, _FOLDER)), manager.seed, is_complete=True)
