"""Measure how fast an entry of the zoo's files trains with other numbers of environments: the script ``n-envs``."""

import argparse
import contextlib
import copy
import importlib
import io
import math
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from stable_baselines3.common.callbacks import BaseCallback

from sb3_ppo_ewma._arguments import check_integer
from sb3_ppo_ewma.batch_scaling import with_defaults
from sb3_ppo_ewma.callbacks.noise_scale import NoiseScaleCallback
from sb3_ppo_ewma.zoo import options, vec_envs
from sb3_ppo_ewma.zoo.algorithms import ALGORITHMS
from sb3_ppo_ewma.zoo.rescaling import entry_manager, entry_parser, read_entry, rescaled, tuned_number_of_envs

_DEFAULT_N_ENVS = (1, 4, 16, 64, 256)
_HEADERS = ("vec env", "environments", "n_steps", "collection steps/s", "training steps/s", "both steps/s", "ratio")
# The recommended number is at least this part of the fastest.
_FAST_ENOUGH = 0.95
# More steps than any measurement takes: the stopwatch ends it.
_ENDLESS = 10**12


class Measurement(NamedTuple):
    """
    Speed of training with one number of environments. A rate is in environment steps of all environments per second.

    :param vec_env: kind of vectorised environment
    :param n_envs: number of environments
    :param n_steps: length of a rollout
    :param collection: rate of collection, without training
    :param training: rate of training, without collection
    """

    vec_env: str
    n_envs: int
    n_steps: int
    collection: float
    training: float

    @property
    def both(self) -> float:
        """Rate of collection and training, one after the other."""
        return 1 / (1 / self.collection + 1 / self.training)

    @property
    def n_samples(self) -> int:
        """Samples of an iteration."""
        return self.n_envs * self.n_steps


class Impossible(NamedTuple):
    """
    A number of environments that training refuses.

    :param vec_env: kind of vectorised environment
    :param n_envs: number of environments
    :param reason: why
    """

    vec_env: str
    n_envs: int
    reason: str


class Stopwatch(BaseCallback):
    """
    Measures collection and training in whole iterations, and ends training after them.

    :param seconds: least time to measure
    :param n_warm_up: iterations to leave out first
    :param multiple_of: measure a multiple of this number of iterations
    """

    def __init__(self, seconds: float, n_warm_up: int = 1, multiple_of: int = 1) -> None:
        super().__init__()
        self.seconds, self.n_warm_up, self.multiple_of = seconds, n_warm_up, multiple_of
        self.n_iterations = -n_warm_up
        self.collection_seconds = self.training_seconds = 0.0
        self.is_done = False
        self._last: float | None = None

    def _on_rollout_start(self) -> None:
        now = time.perf_counter()
        if self._last is not None:
            self._end_iteration(now - self._last)
        self._last = now

    def _on_rollout_end(self) -> None:
        now = time.perf_counter()
        assert self._last is not None
        if self.n_iterations >= 0:
            self.collection_seconds += now - self._last
        self._last = now

    def _end_iteration(self, training_seconds: float) -> None:
        if self.n_iterations >= 0:
            self.training_seconds += training_seconds
        self.n_iterations += 1
        is_whole = self.n_iterations > 0 and self.n_iterations % self.multiple_of == 0
        self.is_done = is_whole and self.collection_seconds + self.training_seconds >= self.seconds

    def _on_step(self) -> bool:
        return not self.is_done  # in the next iteration, whose first step does not count


def main() -> None:
    """Print how fast training is with each number of environments, and which number to use."""
    args = _parser().parse_args()
    _check(args)
    if options.ENVPOOL in args.vec_env:
        vec_envs.register_tasks()
    entry: dict[str, Any] = {}
    for kind in reversed(args.vec_env):  # that of the first kind is used
        with options.replaced(_options(kind)):
            entry = read_entry(args)
    # As when training with --n-envs
    entry["n_envs"] = tuned_for = tuned_number_of_envs(entry)
    n_samples = tuned_for * with_defaults(ALGORITHMS[args.algo], entry)["n_steps"]
    numbers = sorted({*args.n_envs, tuned_for})
    results = [_measure(args, entry, kind, n_envs) for kind in args.vec_env for n_envs in numbers]
    measured = [each for each in results if isinstance(each, Measurement)]
    if not measured:
        raise ValueError(next(each.reason for each in results if isinstance(each, Impossible)))
    own = next((each for each in measured if (each.vec_env, each.n_envs) == (args.vec_env[0], tuned_for)), None)
    print(table(results, own))
    chosen, advice = recommend(measured, n_samples)
    print(f"\n{advice}\n{_command(chosen)}")
    if args.plot:
        plot(measured, args.plot)
        print(f"\nPlot: {args.plot}")
    if args.noise_scale is not None:
        print(f"\n{_noise_scale(args, tuned_for)}")


def _own_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(
        "--n-envs",
        nargs="+",
        type=int,
        default=list(_DEFAULT_N_ENVS),
        metavar="N",
        help="numbers of environments beside that of the entry (default: 1 4 16 64 256)",
    )
    parser.add_argument(
        "--vec-env",
        nargs="+",
        choices=options.VEC_ENVS,
        default=["dummy"],
        help="kinds of vectorised environment (default: dummy)",
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="least time of a measurement (default: 5)")
    parser.add_argument("--noise-scale", type=int, metavar="STEPS", help="estimate the critical batch size as well")
    parser.add_argument("--plot", metavar="FILE.png", help="file for a plot of the speeds")
    return parser


def _parser() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        parents=[entry_parser(), _own_parser()],
        allow_abbrev=False,
        description="Train for a few seconds with each number of environments, with hyper-parameters that keep "
        "training the same; print how fast that is on this machine, and which number to use.",
    )


def _check(args: argparse.Namespace) -> None:
    """
    :param args: arguments of the script
    :raises ValueError: if an argument is not possible
    :raises ImportError: if a plot is wanted and matplotlib is not installed
    """
    for name in ("n_envs", "vec_env"):
        given = getattr(args, name)
        if len(set(given)) < len(given):
            raise ValueError(f"--{name.replace('_', '-')} must be different values, got {' '.join(map(str, given))}")
    for n_envs in args.n_envs:
        check_integer("n_envs", n_envs, minimum=1)
    if not 0 < args.seconds < math.inf:
        raise ValueError(f"--seconds must be positive and finite, got {args.seconds}")
    if args.noise_scale is not None:
        check_integer("--noise-scale", args.noise_scale, minimum=1)
    if args.plot:
        figure = importlib.import_module("matplotlib.figure").Figure()
        formats = figure.canvas.get_supported_filetypes()
        if not Path(args.plot).absolute().parent.is_dir() or Path(args.plot).suffix[1:] not in formats:
            raise ValueError(f"--plot must be a file .{', .'.join(formats)} in an existing folder, got {args.plot}")


def _options(kind: str, n_envs: int | None = None) -> options.Options:
    return options.Options(n_envs=n_envs, vec_env=options.ENVPOOL if kind == options.ENVPOOL else None)


def _measure(args: argparse.Namespace, entry: dict[str, Any], kind: str, n_envs: int) -> Measurement | Impossible:
    print(f"Measuring {n_envs} environments ({kind}) …", file=sys.stderr)
    with contextlib.ExitStack() as stack:
        try:
            rescaled(args.algo, copy.deepcopy(entry), n_envs)  # before environments are made
            model, callbacks = stack.enter_context(_model(args, kind, n_envs))
        except ValueError as error:
            return Impossible(kind, n_envs, str(error))
        stopwatch = Stopwatch(
            args.seconds,
            n_warm_up=1 + model.staleness,  # a queue of stale rollouts fills
            multiple_of=getattr(model, "n_policy_iterations", 1),  # auxiliary phases have their share
        )
        model.learn(_ENDLESS, [*callbacks, stopwatch], log_interval=None)
    if not stopwatch.is_done:
        raise ValueError("a callback of the entry ended training; use -params callback:None")
    n_total = stopwatch.n_iterations * n_envs * model.n_steps
    return Measurement(
        kind, n_envs, model.n_steps, n_total / stopwatch.collection_seconds, n_total / stopwatch.training_seconds
    )


@contextlib.contextmanager
def _model(args: argparse.Namespace, kind: str, n_envs: int) -> Iterator[tuple[Any, list[BaseCallback]]]:
    """
    :param args: arguments of the script
    :param kind: kind of vectorised environment
    :param n_envs: number of environments, which are closed after the context
    :return: the model as the zoo builds it, and the callbacks of the entry
    """
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(options.replaced(_options(kind, n_envs)))
        with contextlib.redirect_stdout(io.StringIO()):
            zoo_kind = "subproc" if kind == "subproc" else "dummy"
            manager: Any = entry_manager(args, folder, eval_freq=-1, verbose=0, vec_env_type=zoo_kind)
            create_envs = manager.create_envs

            def create_closing(*arguments: Any, **kwargs: Any) -> Any:
                env = create_envs(*arguments, **kwargs)
                stack.callback(_close, env)
                return env

            manager.create_envs = create_closing  # closed even if the model refuses its hyper-parameters
            model, _ = manager.setup_experiment()
        yield model, manager.callbacks


def _close(env: Any) -> None:
    with contextlib.suppress(EOFError, BrokenPipeError):  # its process has ended, with an error of its own
        env.close()


def table(results: Sequence[Measurement | Impossible], own: Measurement | None) -> str:
    """
    :param results: measurements in the order of the rows
    :param own: measurement with the number of environments of the entry, to which the ratio is
    :return: a text table
    """
    rows = [list(_HEADERS)]
    for each in results:
        row = [each.vec_env, str(each.n_envs)]
        if isinstance(each, Impossible):
            row.append(f"not possible: {each.reason}")
        else:
            row += [str(each.n_steps), *(f"{rate:.0f}" for rate in (each.collection, each.training, each.both))]
            row.append("–" if own is None else f"{each.both / own.both:.2f}")
        rows.append(row)
    widths = [max(len(row[column]) for row in rows if len(row) == len(_HEADERS)) for column in range(len(_HEADERS))]
    return "\n".join("  ".join(_aligned(row, widths)) for row in rows)


def _aligned(row: list[str], widths: list[int]) -> list[str]:
    if len(row) < len(widths):  # a sentence in place of numbers
        return [row[0].ljust(widths[0]), row[1].rjust(widths[1]), row[2]]
    return [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]


def recommend(measured: Sequence[Measurement], n_samples: int) -> tuple[Measurement, str]:
    """
    :param measured: at least one measurement
    :param n_samples: samples of an iteration as tuned
    :return: the one to train with, and one or two sentences that say so: the smallest number within 5 % of the fastest
        of those that keep the samples of an iteration
    """
    keeping = [each for each in measured if each.n_samples == n_samples] or list(measured)
    fastest = max(keeping, key=lambda each: each.both)
    fast = [each for each in keeping if each.both >= _FAST_ENOUGH * fastest.both]
    chosen = min(fast, key=lambda each: (each.n_envs, -each.both))
    text = (
        f"Train with {chosen.n_envs} environments ({chosen.vec_env}): the smallest number within 5 % of the fastest "
        f"with iterations of {chosen.n_samples} samples."
    )
    larger = max(measured, key=lambda each: each.both)
    if larger.both > fastest.both:
        text += (
            f" {larger.n_envs} environments ({larger.vec_env}) are {larger.both / chosen.both:.2f} times as fast, but "
            f"an iteration then has {larger.n_samples / n_samples:.3g} times its samples."
        )
    return chosen, text


def _command(chosen: Measurement) -> str:
    _, of_entry = _own_parser().parse_known_args()
    kind = [] if chosen.vec_env == "dummy" else ["--vec-env", chosen.vec_env]
    return shlex.join(["sb3-ppo-ewma", "train", *of_entry, "--n-envs", str(chosen.n_envs), *kind])


def _noise_scale(args: argparse.Namespace, n_envs: int) -> str:
    """
    :param args: arguments of the script
    :param n_envs: number of environments that the entry is tuned for
    :return: sentences about the critical batch size
    """
    print("Estimating the critical batch size …", file=sys.stderr)
    noise = NoiseScaleCallback()
    with _model(args, args.vec_env[0], n_envs) as (model, callbacks):
        model.learn(args.noise_scale, [*callbacks, noise], log_interval=None)
        size = model.batch_size or model.n_envs * model.n_steps
    scales = {name: noise.estimates[name].noise_scale for name in ("policy", "joint") if name in noise.estimates}
    found = ", ".join(f"{name} {'not known yet' if b is None else f'{b:.0f}'}" for name, b in scales.items())
    return (
        f"Critical batch size after {model.num_timesteps} steps, in samples: {found or 'not known yet'}. A minibatch "
        f"has {size}.\nWith strategy='paper', which multiplies minibatches, they should stay below the critical size."
    )


def plot(measured: Sequence[Measurement], file: str) -> None:
    """
    :param measured: measurements
    :param file: file for a picture of their rates over the number of environments, one line per kind of environment
    """
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(12, 4), layout="constrained")
    numbers = sorted({each.n_envs for each in measured})
    axes = figure.subplots(1, 3, sharey=True)
    for axis, name in zip(axes, ("collection", "training", "both"), strict=True):
        for kind in dict.fromkeys(each.vec_env for each in measured):
            of_kind = [each for each in measured if each.vec_env == kind]
            axis.plot([each.n_envs for each in of_kind], [getattr(each, name) for each in of_kind], "o-", label=kind)
        axis.set(title=name, xlabel="environments", xscale="log", yscale="log")
        axis.set_xticks(numbers, [str(number) for number in numbers])
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("environment steps per second")
    axes[-1].legend()
    figure.savefig(file)


if __name__ == "__main__":
    main()
