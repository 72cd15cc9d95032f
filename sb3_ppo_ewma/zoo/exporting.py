"""Export a trained agent, compared with ``predict`` in its environment: the script ``export``."""

import argparse
import importlib
from pathlib import Path
from typing import Any

import rl_zoo3.utils
from huggingface_sb3 import EnvironmentName
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.utils import ALGOS, StoreDict
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_ewma.export import FORMATS, export_policy
from sb3_ppo_ewma.zoo import restricted_yaml


def main() -> None:
    """Export the agent that the command line names."""
    args = _parser().parse_args()
    for module in args.gym_packages:
        importlib.import_module(module)
    _, model_path, log_path = rl_zoo3.utils.get_model_path(
        args.exp_id,
        args.folder,
        args.algo,
        args.env,
        args.load_best,
        args.load_checkpoint,
        args.load_last_checkpoint,
    )
    print(f"Loading {model_path}")
    env = _environment(args, Path(log_path, args.env))
    try:
        # Not needed to act, and perhaps not readable in another version of Python
        unused = {"learning_rate": 0.0, "lr_schedule": lambda _: 0.0, "clip_range": lambda _: 0.0}
        model: Any = ALGOS[args.algo].load(model_path, device="cpu", custom_objects=unused)
        proof = export_policy(
            model,
            args.output,
            env,
            deterministic=not args.stochastic,
            n_observations=args.n_timesteps,
            env_id=args.env.gym_id,
        )
    finally:
        env.close()
    print(f"{args.output}: {proof}")


def _environment(args: argparse.Namespace, settings: Path) -> VecEnv:
    """
    :param args: arguments of the script
    :param settings: folder with the settings of the training
    :return: environments as ``enjoy`` makes them
    """
    hyperparams, stats_path = rl_zoo3.utils.get_saved_hyperparams(str(settings), test_mode=True)
    env_kwargs = hyperparams.pop("env_kwargs", {})
    arguments = settings / "args.yml"
    if arguments.is_file():
        with arguments.open() as file:
            env_kwargs = restricted_yaml.load(file)["env_kwargs"] or env_kwargs
    env: VecEnv = rl_zoo3.utils.create_test_env(
        args.env.gym_id,
        n_envs=args.n_envs,
        stats_path=stats_path,
        seed=args.seed,
        should_render=False,
        hyperparams=hyperparams,
        env_kwargs={**env_kwargs, **(args.env_kwargs or {})},
        vec_env_cls=ExperimentManager.default_vec_env_cls,
    )
    return env


def _output(text: str) -> Path:
    if Path(text).suffix not in FORMATS:
        raise argparse.ArgumentTypeError(f"must end in {' or '.join(FORMATS)}, got {text}")
    return Path(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description="Export a trained agent to a file that acts without Stable-Baselines3, with the normalisation of "
        "observations. It is compared with predict in the agent's environment, and written only if it acts the same.",
    )
    names = [name for name, algorithm in ALGOS.items() if issubclass(algorithm, OnPolicyAlgorithm)]
    parser.add_argument("--algo", required=True, choices=names)
    parser.add_argument("--env", required=True, type=EnvironmentName, help="name of the environment")
    parser.add_argument(
        "-o", "--output", required=True, type=_output, help="file to write: .onnx, or .pt2 for torch.export"
    )
    parser.add_argument("-f", "--folder", default="logs", help="folder of the trained agents (default: logs)")
    parser.add_argument("--exp-id", type=int, default=0, help="number of the run (default: 0, the latest; -1: no run)")
    parser.add_argument("--load-best", action="store_true", help="export the best agent of the run's evaluations")
    parser.add_argument("--load-checkpoint", type=int, metavar="STEPS", help="export the checkpoint after STEPS steps")
    parser.add_argument("--load-last-checkpoint", action="store_true", help="export the last checkpoint")
    parser.add_argument("--stochastic", action="store_true", help="random actions; the file takes the random numbers")
    parser.add_argument("-n", "--n-timesteps", type=int, default=1000, help="observations to compare (default: 1000)")
    parser.add_argument("--n-envs", type=int, default=4, help="number of environments (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the environments (default: 0)")
    parser.add_argument("--env-kwargs", nargs="+", action=StoreDict, metavar="NAME:VALUE")
    parser.add_argument("--gym-packages", nargs="+", default=[], help="packages that register environments")
    return parser


if __name__ == "__main__":
    main()
