"""
``--vec-env``. With ``envpool``, the zoo's scripts run with environments of EnvPool: the zoo makes Gymnasium's
environments with ``make_vec_env`` and wraps the result; with this option, ``make_vec_env`` returns EnvPool's.
"""

import contextlib
import contextvars
import functools
import re
from collections.abc import Iterator
from typing import Any

import rl_zoo3.utils
from rl_zoo3 import exp_manager
from rl_zoo3.exp_manager import ExperimentManager
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

from sb3_ppo_ewma.envs import envpool_env
from sb3_ppo_ewma.envs.envpool_vec_env import EnvPoolVecEnv, check_task, import_envpool
from sb3_ppo_ewma.zoo import options, rendering, trained_agents
from sb3_ppo_ewma.zoo.patches._replace import AnyFunction, replace_function

_ATARI = "envpool.atari"
_NO_FRAMESKIP = re.compile(r"(\w+)NoFrameskip-v4")
_ATARI_WRAPPER = "stable_baselines3.common.atari_wrappers.AtariWrapper"
# Arguments of SB3's AtariWrapper: EnvPool's options
_ATARI_OPTIONS = {
    "noop_max": ("noop_max",),
    "frame_skip": ("frame_skip",),
    "screen_size": ("img_height", "img_width"),
    "terminal_on_life_loss": ("episodic_life",),
    "clip_reward": ("reward_clip",),
    "action_repeat_probability": ("repeat_action_probability",),
}
# Options that AtariWrapper switches on by default and EnvPool does not
_ATARI_DEFAULTS = {"episodic_life": True, "reward_clip": True}

# Name of a task in EnvPool, and its options
Task = tuple[str, dict[str, Any]]
# One per thread: a search with --n-jobs makes environments in several.
_task: contextvars.ContextVar[Task | None] = contextvars.ContextVar("task", default=None)


@functools.cache  # once
def install_hooks() -> None:
    """Make EnvPool's environments in place of the zoo's if the option asks for them."""
    replace_function(ExperimentManager, "__init__", _init)
    replace_function(ExperimentManager, "_preprocess_hyperparams", _preprocess_hyperparams)
    replace_function(ExperimentManager, "create_envs", _create_envs)
    replace_function(exp_manager, "make_vec_env", _make_vec_env)
    replace_function(rl_zoo3.utils, "make_vec_env", _make_vec_env)
    replace_function(rl_zoo3.utils, "create_test_env", _create_test_env)
    replace_function(rl_zoo3.utils, "get_model_path", _get_model_path)
    rl_zoo3.create_test_env = rl_zoo3.utils.create_test_env  # the scripts import it from there


@functools.cache  # once
def register_tasks() -> None:
    """
    Register all tasks of EnvPool with Gymnasium, because the zoo looks their names up there.

    :raises ImportError: if EnvPool is not installed
    """
    names = set(import_envpool().list_all_envs())
    games = {name for name in names if _is_atari(name)}
    envpool_env.register(sorted(games), envpool_env.EnvPoolAtariEnv)
    envpool_env.register(sorted(names - games))


def _is_atari(task_id: str) -> bool:
    return bool(import_envpool().registration.registry.specs[task_id][0] == _ATARI)


def _init(upstream: AnyFunction, manager: Any, *args: Any, **kwargs: Any) -> None:
    upstream(manager, *args, **kwargs)
    manager.envpool_task = None
    if options.current.vec_env == options.ENVPOOL:
        _task_of(manager.env_name.gym_id)  # refuse an unknown task before the zoo creates a folder
        if manager.args is not None:
            manager.args.vec_env = options.ENVPOOL  # saved in args.yml, where enjoy finds it


def _preprocess_hyperparams(upstream: AnyFunction, manager: Any, hyperparams: dict[str, Any]) -> Any:
    wrapper = hyperparams.get("env_wrapper")  # upstream replaces it by a function
    result = upstream(manager, hyperparams)
    if options.current.vec_env == options.ENVPOOL:
        manager.envpool_task = _task_with_options(manager.env_name.gym_id, wrapper, manager.frame_stack)
        if "stack_num" in manager.envpool_task[1]:
            manager.frame_stack = None
    return result


def _create_envs(upstream: AnyFunction, manager: Any, *args: Any, **kwargs: Any) -> Any:
    with _making(manager.envpool_task):
        return upstream(manager, *args, **kwargs)


def _create_test_env(upstream: AnyFunction, env_id: str, *args: Any, **kwargs: Any) -> Any:
    if kwargs.get("should_render", True) and (kwargs.get("env_kwargs") or {}).get("render_mode", "human") == "human":
        rendering.check_screen(env_id)
    task = None
    if options.current.vec_env == options.ENVPOOL:
        hyperparams = kwargs["hyperparams"]
        task = _task_with_options(env_id, hyperparams.get("env_wrapper"), hyperparams.get("frame_stack") or None)
        if "stack_num" in task[1]:
            hyperparams["frame_stack"] = 0
    elif options.current.vec_env is not None:
        kwargs["vec_env_cls"] = {"dummy": DummyVecEnv, "subproc": SubprocVecEnv}[options.current.vec_env]
    with _making(task):
        return upstream(env_id, *args, **kwargs)


def _get_model_path(upstream: AnyFunction, exp_id: int, folder: str, algo: str, env_name: Any, *args: Any) -> Any:
    result = upstream(exp_id, folder, algo, env_name, *args)
    if trained_agents.saved_arguments(result[2], env_name).get("vec_env") == options.ENVPOOL:
        register_tasks()
        # Without the option, use the kind of environment that the agent was trained in.
        if options.current.vec_env is None:
            options.current.vec_env = options.ENVPOOL
    return result


@contextlib.contextmanager
def _making(task: Task | None) -> Iterator[None]:
    """
    :param task: EnvPool's task that ``make_vec_env`` makes within the context; ``None`` for Gymnasium's environments
    """
    token = _task.set(task)
    try:
        yield
    finally:
        _task.reset(token)


def _make_vec_env(upstream: AnyFunction, *args: Any, **kwargs: Any) -> Any:
    task = _task.get()
    if task is None:
        return upstream(*args, **kwargs)
    monitor_kwargs = kwargs.get("monitor_kwargs") or {}
    unknown = monitor_kwargs.keys() - {"info_keywords"}
    if unknown:
        raise ValueError(f"monitor_kwargs: EnvPool's statistics know info_keywords, not {unknown.pop()}")
    task_id, task_options = task
    from_zoo = {name: kwargs[name] for name in ("monitor_dir", "start_index") if name in kwargs}
    given = {**from_zoo, **monitor_kwargs, **task_options, **kwargs["env_kwargs"]}
    return EnvPoolVecEnv(task_id, kwargs["n_envs"], kwargs["seed"], **given)


def _task_of(gym_id: str) -> str:
    """
    :param gym_id: name of an environment in Gymnasium
    :return: name of the same task in EnvPool
    :raises ValueError: if EnvPool does not have it
    """
    known = import_envpool().list_all_envs()
    match = _NO_FRAMESKIP.fullmatch(gym_id)
    task_id = f"{match[1]}-v5" if match else gym_id
    check_task(task_id, known)
    return task_id


def _task_with_options(gym_id: str, env_wrapper: Any, frame_stack: int | None) -> Task:
    """
    :param gym_id: name of an environment in Gymnasium
    :param env_wrapper: value of this hyper-parameter: names of classes, or dicts of a name and arguments
    :param frame_stack: value of this hyper-parameter
    :return: name of the task in EnvPool, and options equivalent to the wrappers and the frame stack
    :raises ValueError: if EnvPool does not have the task, or no option equivalent to a wrapper
    """
    task_id = _task_of(gym_id)
    is_atari = _is_atari(task_id)
    found: dict[str, Any] = {}
    wrappers = env_wrapper if isinstance(env_wrapper, list) else [env_wrapper] if env_wrapper else []
    for wrapper in wrappers:
        name, arguments = next(iter(wrapper.items())) if isinstance(wrapper, dict) else (wrapper, {})
        if not is_atari or name != _ATARI_WRAPPER:
            raise ValueError(
                f"env_wrapper {name} cannot wrap EnvPool's environments, which are not Python objects"
                f"{f': only {_ATARI_WRAPPER} has equivalent options' if is_atari else ''}. "
                "Use --vec-env dummy, or hyper-parameters without the wrapper (env_wrapper:None)"
            )
        unknown = arguments.keys() - _ATARI_OPTIONS.keys()
        if unknown:
            raise ValueError(f"AtariWrapper has {', '.join(_ATARI_OPTIONS)}, not {unknown.pop()}")
        found |= _ATARI_DEFAULTS
        found |= {ours: value for key, value in arguments.items() for ours in _ATARI_OPTIONS[key]}
    if is_atari:
        # EnvPool stacks frames itself. The callers then switch the zoo's own stacking off.
        found["stack_num"] = frame_stack or 1
    return task_id, found
