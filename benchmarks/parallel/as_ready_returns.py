"""
Does a training whose environments do not wait for each other learn as much as one whose environments do? From the root
of the repository:

    python -m benchmarks.parallel.as_ready_returns --jobs 1

A tenth of the steps takes ten times as long as the others, so that the environments do get ahead of each other. Runs
that are in results/as_ready_returns.csv are not repeated.
"""

from pathlib import Path
from typing import Any

from benchmarks.experiments.runs import Variant, execute, parser
from benchmarks.experiments.staleness import SETTINGS, UNTRAINED
from benchmarks.metadata import REPOSITORY
from benchmarks.parallel.as_ready import AS_READY, TOGETHER

HERE = Path(__file__).parent
N_SEEDS = 3
MEASURES = {"final": "final_return", "mean": "mean_return"}
SLEEPS = {"benchmarks.parallel.as_ready.Sleeping": {"step_ms": 0.2, "slow_ms": 2.0, "slow_share": 0.1}}


def variants() -> list[Variant]:
    """
    :return: of both environments, with the settings of the experiment on stale data
    """
    found = []
    for env, settings in SETTINGS.items():
        untrained: dict[str, Any] = {**settings, "learning_rate": 0.0, "n_timesteps": 50_000}
        found.append(Variant(env, UNTRAINED, "ppo_ewma", untrained))
        in_processes = {**settings, "vec_env_type": "subproc", "env_wrapper": [SLEEPS]}
        found += [Variant(env, kind, "ppo_ewma", {**in_processes, "collect": kind}) for kind in (TOGETHER, AS_READY)]
    return found


def report(file: Path) -> None:
    # Here, so that training does not need what reports do.
    from benchmarks.experiments import report as common

    runs = common.load(file)
    envs = [env for env in SETTINGS if env in set(runs.env)]
    names = {name: name for name in (TOGETHER, AS_READY)}
    figure, axes = common.panels(envs, len(envs))
    lines = []
    for env in envs:
        of_env = runs[runs.env == env]
        common.plot_curves(axes[env], of_env, names)
        lines += ["", f"## {env}", "", *common.table_of_returns("variant", of_env, names)]
        rows = []
        for label, column in MEASURES.items():
            scores = common.scores(common.normalized(of_env, UNTRAINED, TOGETHER, column))
            if AS_READY in scores:
                rows.append([label, common.difference(scores[AS_READY], scores[TOGETHER])])
        lines += [
            "",
            f"Lost with {AS_READY} against {TOGETHER}, normalised (negative: gained):",
            "",
            *common.table(["return", "lost"], rows),
        ]
    axes[envs[0]].legend(frameon=False, fontsize="small")
    intro = [
        "Final return: of the training episodes in the last tenth of training; mean return: of all of training. "
        f"Normalised: 0 is the untrained policy, 1 the mean of {TOGETHER}. A tenth of the steps takes ten times as "
        "long as the others.",
        "",
        common.save(figure, file),
    ]
    common.write(file, "Environments that do not wait for each other: what is learned", [*intro, *lines])


def main() -> None:
    args = parser(__doc__, "as_ready_returns", N_SEEDS).parse_args()
    args.results = args.results or (REPOSITORY / "logs" / "quick" if args.quick else HERE / "results")
    quick = {"n_timesteps": 2000, "n_envs": 4, "n_steps": 16, "batch_size": 16}
    execute(args, variants(), quick, report)


if __name__ == "__main__":
    main()
