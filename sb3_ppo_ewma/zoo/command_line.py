"""One command for all scripts of the zoo, which reports the user's mistakes in one sentence each."""

import argparse
import contextlib
import importlib
import os
import runpy
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence

import gymnasium as gym

from sb3_ppo_ewma.zoo import rendering
from sb3_ppo_ewma.zoo.signals import stop_signals

PROG = "sb3-ppo-ewma"
TRACEBACK_VARIABLE = "SB3_PPO_EWMA_TRACEBACK"

# Module and purpose of each script, by its name. Each runs like `python -m module`.
SCRIPTS = {
    "train": ("rl_zoo3.train", "train an agent, or search for hyper-parameters (-optimize)"),
    "rescale": ("sb3_ppo_ewma.zoo.rescaling", "print hyper-parameters for another number of environments"),
    "n-envs": ("sb3_ppo_ewma.zoo.measuring", "measure which number of environments trains fastest on this machine"),
    "enjoy": ("rl_zoo3.enjoy", "watch a trained agent, or only measure it (--no-render)"),
    "export": ("sb3_ppo_ewma.zoo.exporting", "export a trained agent to ONNX or torch.export"),
    "record_video": ("rl_zoo3.record_video", "record a video of a trained agent"),
    "record_training": ("rl_zoo3.record_training", "record one video of all checkpoints of a training run"),
    "plot_train": ("rl_zoo3.plots.plot_train", "plot the reward during training"),
    "all_plots": ("rl_zoo3.plots.all_plots", "plot and tabulate evaluations of several runs"),
    "plot_from_file": ("rl_zoo3.plots.plot_from_file", "plot what all_plots saved"),
    "benchmark": ("rl_zoo3.benchmark", "evaluate all trained agents of a folder"),
    "push_to_hub": ("rl_zoo3.push_to_hub", "upload a trained agent to the Hugging Face Hub"),
    "load_from_hub": ("rl_zoo3.load_from_hub", "download a trained agent from the Hugging Face Hub"),
}

# Options that these scripts need but do not declare as required
_REQUIRED_OPTIONS = {
    "all_plots": [("-a", "--algos"), ("-e", "--env"), ("-f", "--exp-folders")],
    "plot_from_file": [("-i", "--input")],
}

# The extra of this package that installs a module. Others may be the user's own, and a package of that name a
# stranger's.
_EXTRAS = {
    **dict.fromkeys(
        (
            "rl_zoo3",
            "sb3_contrib",
            "optuna",
            "requests",
            "huggingface_hub",
            "huggingface_sb3",
            "pytablewriter",
            "pandas",
        ),
        "zoo",
    ),
    **dict.fromkeys(("seaborn", "rliable", "scipy", "matplotlib"), "plots"),
    **dict.fromkeys(("moviepy", "pygame"), "video"),
    **dict.fromkeys(("minigrid", "minatar", "mujoco", "Box2D"), "envs"),
    **dict.fromkeys(("ale_py", "cv2"), "atari"),
    **dict.fromkeys(("onnx", "onnxruntime", "onnxscript"), "export"),
    "envpool": "envpool",
    "tensorboard": "tensorboard",
}

# Errors of the user's input or machine get one sentence. Any other error is a bug and keeps its traceback.
_EXPECTED_ERRORS = (ImportError, ValueError, AssertionError, NotImplementedError, OSError, gym.error.Error)
_HTTP_PACKAGES = {"httpx", "httpx2", "requests"}
_EXPECTED_FROM = {"optuna", "sqlalchemy", "yaml", "huggingface_hub", *_HTTP_PACKAGES, *rendering.LIBRARIES}


def main(argv: Sequence[str] | None = None) -> None:
    """
    Run one of the zoo's scripts with our algorithms.

    :param argv: name of the script, then its arguments; by default, the arguments of the process
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    script = _parser().parse_args(arguments[:1]).script
    process_arguments, sys.argv = sys.argv, [f"{PROG} {script}", *arguments[1:]]
    try:
        with stop_signals(sys.argv[0]), _current_folder_on_path():
            _run(script, arguments[1:])
    except Exception as error:
        if os.environ.get(TRACEBACK_VARIABLE) or not _is_expected(error):
            raise
        # An error in the middle of training may be more than a mistake of the user.
        in_training = any(frame.name == "learn" for frame in traceback.extract_tb(error.__traceback__))
        hint = f" ({TRACEBACK_VARIABLE}=1 in the environment shows where)" if in_training else ""
        sys.exit(f"{PROG} {script}: {explain(error)}{hint}")
    finally:
        sys.argv = process_arguments


@contextlib.contextmanager
def _current_folder_on_path() -> Iterator[None]:
    """Within the context, modules of the current folder can be imported: by the console script as by ``python -m``."""
    folder = os.getcwd()
    if getattr(sys.flags, "safe_path", False) or {"", folder} & set(sys.path):
        yield
        return
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, SCRIPTS))
    scripts = "\n".join(f"  {name:<{width}}  {purpose}" for name, (_, purpose) in SCRIPTS.items())
    parser = argparse.ArgumentParser(
        prog=PROG,
        usage=f"{PROG} SCRIPT [ARGUMENTS ...]",
        description="Run a script of rl-zoo3 with its own algorithms, and with PPO-EWMA, PPG and PPG-EWMA, also "
        "recurrent and with action masks.",
        epilog=f"scripts:\n{scripts}\n\n"
        f"'{PROG} SCRIPT --help' lists the arguments of a script. {TRACEBACK_VARIABLE}=1 in the\n"
        "environment shows the traceback of every error.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("script", metavar="SCRIPT", choices=SCRIPTS, help="one of the scripts below")
    return parser


def _run(script: str, arguments: list[str]) -> None:
    importlib.import_module("rl_zoo3")  # first: without it, name it rather than a package that it would install
    # Imported here, so that --help works without rl_zoo3.
    from sb3_ppo_ewma.zoo import (
        action_masks,
        child_processes,
        data_parallel,
        hub,
        options,
        plots,
        registration,
        trained_agents,
        vec_envs,
    )
    from sb3_ppo_ewma.zoo.patches import ffmpeg_status, script_patches

    registration.register()
    hub.install_hooks()
    wants_help = bool({"-h", "--help"} & set(arguments))
    if not wants_help:
        _check_required_options(script, arguments)
        if script == "record_training":
            ffmpeg_status.find_ffmpeg()  # before the script deletes older videos
    # runpy warns of scripts that were imported before. It runs them anew all the same.
    warnings.filterwarnings("ignore", message=".*found in sys.modules after import of package", module="runpy")
    with contextlib.ExitStack() as stack:
        stack.enter_context(child_processes.redirect_child_scripts())
        if SCRIPTS[script][0].startswith("rl_zoo3."):
            stack.enter_context(script_patches())
        stack.enter_context(action_masks.script())
        if script == "train" and not wants_help:
            stack.enter_context(data_parallel.process_group())
        if script in options.SCRIPTS:
            sys.argv[1:] = stack.enter_context(options.taken_from(arguments, script, sys.argv[0]))
            if wants_help:
                stack.callback(lambda: print(f"\n{options.help_text(script, sys.argv[0])}"))
            elif options.current.vec_env == options.ENVPOOL:
                vec_envs.register_tasks()
            trained_agents.import_gym_packages(options.current.gym_packages)
        if script == "plot_train":
            stack.enter_context(plots.saved_or_shown())
        runpy.run_module(SCRIPTS[script][0], run_name="__main__")


def _check_required_options(script: str, arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog=f"{PROG} {script}", add_help=False)
    for short, long in _REQUIRED_OPTIONS.get(script, []):
        parser.add_argument(short, long, nargs="+", required=True)
    parser.parse_known_args(arguments)


def _is_expected(error: Exception) -> bool:
    return bool(str(error)) and (isinstance(error, _EXPECTED_ERRORS) or bool(_packages(error) & _EXPECTED_FROM))


def explain(error: Exception) -> str:
    """
    :param error: error that the user can do something about
    :return: one sentence that explains it
    """
    message = str(error)
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        return _explain_missing_module(message, error.name)
    if _packages(error) & rendering.LIBRARIES:
        return rendering.explain(error)
    if _packages(error) & _HTTP_PACKAGES:
        return f"the request to the Hugging Face Hub failed: {message}"
    if isinstance(error, OSError) and error.filename is not None:
        if os.path.basename(str(error.filename)) == "benchmark.md":
            return "none of the agents could be evaluated"  # the first evaluation would have made the folder
        return f"{error.filename}: {error.strerror}"
    if message.startswith("min() "):  # plot_from_file skips algorithms with a single run, and none is left
        return "it takes at least two runs of every algorithm"
    if "not found in gym registry" in message:
        return (
            f"{message} If a package registers it, name the package with --gym-packages; MiniGrid and MinAtar come "
            "with pip install 'sb3-ppo-ewma[envs]', Atari with pip install 'sb3-ppo-ewma[atari]'."
        )
    return message


def _explain_missing_module(message: str, name: str) -> str:
    package = name.partition(".")[0]
    is_missing = sys.modules.get(package) is None or name in sys.modules  # not only a part that it never had
    if package in _EXTRAS and is_missing:
        return f"the package {package} is not installed: pip install 'sb3-ppo-ewma[{_EXTRAS[package]}]'"
    if name.endswith(".py") or os.sep in name:
        return f"{message}: give the name of a module, such as my_envs or my_package.envs, not of a file"
    return f"{message}. Python looks in the current folder, in those of PYTHONPATH, and among installed packages"


def _packages(error: Exception) -> set[str]:
    return {cls.__module__.partition(".")[0] for cls in type(error).__mro__}
