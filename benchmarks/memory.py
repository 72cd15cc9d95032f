"""
How much memory does a phase of PPG take beyond what it has to store? Observations have the size of Procgen's, 64x64x3
of uint8, and come from a small pool of random frames, so that the environment costs nothing. From the root of the
repository:

    python -m benchmarks.memory

The process trains until one auxiliary phase has ended. Stored bytes are those of the observations, in their own dtype,
and of one float32 value target each. The ratio is (peak - before) / stored, where "before" is the resident set size
(RSS) when training begins, after model and environments were built, and "peak" the greatest RSS from then on: rollout
buffer, activations, gradients and optimisers count too, as do libraries that are set up when they are first used.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv

from benchmarks.metadata import metadata
from sb3_ppo_ewma import PPG

HERE = Path(__file__).parent
TARGET = 1.15
PROCESS = Path("/proc/self")  # Linux only
GIB = 2**30


class RandomFrames(gym.Env[np.ndarray, int]):
    """Frames from a pool, in turn; episodes of 1000 steps; 15 actions, as in Procgen."""

    observation_space = spaces.Box(0, 255, (64, 64, 3), np.uint8)
    action_space = spaces.Discrete(15)
    frames = np.random.default_rng(0).integers(0, 256, (64, 64, 64, 3), dtype=np.uint8)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.n_steps = 0
        return self.frames[0], {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.n_steps += 1
        frame = self.frames[self.n_steps % len(self.frames)]
        return frame, float(action == 0), False, self.n_steps == 1000, {}


class MemoryBeforeTraining(BaseCallback):
    """Reads the RSS when training begins, and lets the kernel forget the peak until then."""

    rss = 0

    def _on_training_start(self) -> None:
        self.rss = status("VmRSS")
        try:
            (PROCESS / "clear_refs").write_text("5")
        except OSError:
            # Not allowed here. The peak is then that since the process began, which can only be greater.
            print("The kernel does not reset the peak")

    def _on_step(self) -> bool:
        return True


def status(entry: str) -> int:
    """
    :param entry: of /proc/self/status: VmRSS is the resident set size, VmHWM its peak ("high water mark")
    :return: bytes
    """
    lines = (PROCESS / "status").read_text().splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith(f"{entry}:"))
    return int(kilobytes) * 1024


def main() -> None:
    args = parse_arguments()
    model = PPG(
        args.policy,
        DummyVecEnv([RandomFrames] * args.n_envs),
        n_steps=args.n_steps,
        batch_size=args.batch_size,
        n_policy_iterations=args.n_policy_iterations,
        n_aux_epochs=1,
        aux_batch_size=args.aux_batch_size,
        device="cpu",
    )
    n_samples = args.n_steps * args.n_envs * args.n_policy_iterations
    before, began = MemoryBeforeTraining(), time.monotonic()
    model.learn(n_samples, callback=before)
    peak, seconds = status("VmHWM"), time.monotonic() - began
    if model.logger.name_to_value["aux/n_phases"] != 1:
        raise RuntimeError(f"expected one auxiliary phase, got {model.logger.name_to_value['aux/n_phases']}")
    frame = RandomFrames.observation_space
    result = {
        "stored_bytes": n_samples * (int(np.prod(frame.shape)) * frame.dtype.itemsize + np.float32().itemsize),
        "rss_before_bytes": before.rss,
        "rss_peak_bytes": peak,
    }
    result["ratio"] = round((peak - before.rss) / result["stored_bytes"], 4)
    tell(result, seconds)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in vars(args).items() if name != "output"}
    content = {**result, "target": TARGET, "seconds": round(seconds, 1), "settings": settings, **metadata()}
    args.output.write_text(json.dumps(content, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="CnnPolicy", choices=["CnnPolicy", "ImpalaPolicy"])
    parser.add_argument("--n-envs", type=int, default=64)
    parser.add_argument("--n-steps", type=int, default=64)
    parser.add_argument("--n-policy-iterations", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--aux-batch-size", type=int, default=128)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "memory.json")
    return parser.parse_args()


def tell(result: dict[str, Any], seconds: float) -> None:
    """
    :param result: bytes and their ratio
    :param seconds: that training took
    """
    print(f"stored             {result['stored_bytes'] / GIB:6.3f} GiB")
    print(f"RSS before         {result['rss_before_bytes'] / GIB:6.3f} GiB")
    print(f"RSS at its peak    {result['rss_peak_bytes'] / GIB:6.3f} GiB")
    print(f"(peak - before) / stored = {result['ratio']:.3f}, target at most {TARGET}")
    print(f"{seconds:.0f} s")


if __name__ == "__main__":
    main()
