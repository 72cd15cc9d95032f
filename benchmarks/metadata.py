"""What has to stand beside a measured number: command, date, commit, versions, hardware."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
_PACKAGES = [
    "torch",
    "stable_baselines3",
    "sb3_contrib",
    "rl_zoo3",
    "sbx_rl",
    "jax",
    "torchrl",
    "gymnasium",
    "minatar",
    "mujoco",
    "ale_py",
    "envpool",
    "pettingzoo",
    "numpy",
]
# What a number depends on; results and documentation may change without it.
_SOURCES = ["sb3_ppo_ewma", "benchmarks/*.py", "benchmarks/*.yml"]


def metadata() -> dict[str, Any]:
    """
    :return: for a JSON file, of the running program
    """
    return {
        "command": command(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": _git("status", "--porcelain", "--", *_SOURCES) != "",
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "hardware": {
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "system": platform.platform(aliased=True, terse=True),
        },
    }


def command() -> str:
    """
    :return: command line of the running program, without the path of the interpreter
    """
    spec = sys.modules["__main__"].__spec__
    program = ["-m", spec.name.removesuffix(".__main__")] if spec else sys.argv[:1]
    return shlex.join(["python", *program, *sys.argv[1:]])


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _git(*arguments: str) -> str:
    try:
        result = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return result.stdout.strip()


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
