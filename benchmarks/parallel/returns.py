"""
Does a training that collects at the same time learn as much as one that does not? From the root of the repository:

    python -m benchmarks.parallel.returns --jobs 1

Runs that are in results/returns.csv are not repeated.
"""

from pathlib import Path
from typing import Any

from benchmarks.experiments.runs import Variant, execute, parser
from benchmarks.experiments.staleness import SETTINGS, UNTRAINED
from benchmarks.metadata import REPOSITORY

HERE = Path(__file__).parent
N_SEEDS = 3
MEASURES = {"final": "final_return", "mean": "mean_return"}
SYNCHRONOUS, ASYNCHRONOUS = "synchronous", "asynchronous"
WITHOUT, PROXIMAL = "asynchronous, no EWMA", "asynchronous, no EWMA, proximal"
# As results/returns.json has it, from a version in which timing always decided
LAG: dict[str, Any] = {"max_policy_lag": 1, "lag_mode": "newest"}
# Whose proximal policy is that of the beginning of the iteration; proximal: as if it had also collected
VARIANTS: dict[str, dict[str, Any]] = {
    SYNCHRONOUS: {},
    ASYNCHRONOUS: {**LAG},
    WITHOUT: {**LAG, "prox_decay": None},
    PROXIMAL: {**LAG, "prox_decay": None, "staleness_mode": "proximal"},
}


def variants() -> list[Variant]:
    """
    :return: of both environments, with the settings of the experiment on stale data
    """
    found = []
    for env, settings in SETTINGS.items():
        found.append(Variant(env, UNTRAINED, "ppo_ewma", {**settings, "learning_rate": 0.0, "n_timesteps": 50_000}))
        found += [Variant(env, name, "ppo_ewma", {**settings, **changed}) for name, changed in VARIANTS.items()]
    return found


def report(file: Path) -> None:
    # Here, so that training does not need what reports do.
    from benchmarks.experiments import report as common

    runs = common.load(file)
    envs = [env for env in SETTINGS if env in set(runs.env)]
    figure, axes = common.panels(envs, len(envs))
    lines = []
    for env in envs:
        of_env = runs[runs.env == env]
        common.plot_curves(axes[env], of_env, {name: name for name in VARIANTS})
        lines += ["", f"## {env}", "", *common.table_of_returns("variant", of_env, {name: name for name in VARIANTS})]
        rows = []
        for label, column in MEASURES.items():
            scores = common.scores(common.normalized(of_env, UNTRAINED, SYNCHRONOUS, column))
            differences = {
                name: common.difference(scores[name], scores[SYNCHRONOUS])
                for name in VARIANTS
                if name != SYNCHRONOUS and name in scores
            }
            rows += [[label, name, difference] for name, difference in differences.items()]
        lines += [
            "",
            "Lost against synchronous training, normalised (negative: gained):",
            "",
            *common.table(["return", "", "lost"], rows),
        ]
    axes[envs[0]].legend(frameon=False, fontsize="small")
    intro = [
        "Final return: of the training episodes in the last tenth of training; mean return: of all of training. "
        "Normalised: 0 is the untrained policy, 1 the mean of synchronous training. Rollouts of asynchronous training "
        "lack at most one training. Proximal: the policy at the beginning of the iteration also takes the place of the "
        "one that collected, which is wrong on purpose.",
        "",
        common.save(figure, file),
    ]
    common.write(file, "Asynchronous collection: what is learned", [*intro, *lines])


def main() -> None:
    args = parser(__doc__, "returns", N_SEEDS).parse_args()
    args.results = args.results or (REPOSITORY / "logs" / "quick" if args.quick else HERE / "results")
    quick = {"n_timesteps": 2000, "n_envs": 4, "n_steps": 16, "batch_size": 16}
    execute(args, variants(), quick, report)


if __name__ == "__main__":
    main()
