"""
Training on data that is several iterations old: decoupled policies against the two couplings, without and with an EWMA.
From the root of the repository:

    python -m benchmarks.experiments.staleness --jobs 2

Runs that are in results/staleness.csv are not repeated.
"""

from pathlib import Path
from typing import Any

from benchmarks.experiments.runs import Variant, execute, parser

N_SEEDS = 3
STALENESS = [0, 1, 2, 4, 8, 16]
MODES = ["decoupled", "behavior", "proximal"]
# Like the paper's PPO: 3 epochs of 8 minibatches. Many short iterations, so that 16 of them are a small part of a run
SETTINGS: dict[str, dict[str, Any]] = {
    "Acrobot-v1": {
        "policy": "MlpPolicy",
        "normalize": True,
        "n_timesteps": 200_000,
        "n_envs": 16,
        "n_steps": 64,
        "batch_size": 128,
        "n_epochs": 3,
        "learning_rate": 3e-3,
        "gamma": 0.99,
        "gae_lambda": 0.94,
        "ent_coef": 0.0,
    },
    "MinAtar/SpaceInvaders-v1": {
        "policy": "MlpPolicy",
        "policy_kwargs": "dict(activation_fn=nn.ReLU, net_arch=dict(pi=[64, 64], vf=[64, 64]))",
        "n_timesteps": 400_000,
        "n_envs": 16,
        "n_steps": 128,
        "batch_size": 256,
        "n_epochs": 3,
        "learning_rate": 5e-4,
        "gamma": 0.99,
        "gae_lambda": 0.95,
        "ent_coef": 0.01,
    },
}
UNTRAINED = "untrained"
FRESH = "decoupled, 0"
QUICK_NAMES = [UNTRAINED, FRESH, "decoupled, 1", "behavior, 1", "proximal, 1", "proximal, 1, EWMA"]


def name_of(mode: str, staleness: int, has_ewma: bool) -> str:
    return f"{mode}, {staleness}" + (", EWMA" if has_ewma else "")


def variants() -> list[Variant]:
    """
    :return: all modes with every staleness, without and with EWMA; each makes as many gradient steps, so that the
        iterations that wait in the queue come on top of the budget. Without staleness the modes are the same
    """
    found = []
    for env, settings in SETTINGS.items():
        found.append(Variant(env, UNTRAINED, "ppo_ewma", {**settings, "learning_rate": 0.0, "n_timesteps": 50_000}))
        for staleness in STALENESS:
            waiting = staleness * settings["n_envs"] * settings["n_steps"]
            changed = {"staleness": staleness, "n_timesteps": settings["n_timesteps"] + waiting}
            found += [
                Variant(
                    env,
                    name_of(mode, staleness, has_ewma),
                    "ppo_ewma",
                    {**settings, **changed, "staleness_mode": mode, "prox_decay": "auto" if has_ewma else None},
                )
                for has_ewma in (False, True)
                for mode in (MODES if staleness > 0 else MODES[:1])
            ]
    return found


def report(file: Path) -> None:
    # Here, so that training does not need what reports do.
    from benchmarks.experiments import report as common

    runs = common.normalized(common.load(file), UNTRAINED, FRESH)
    figure, axes = common.panels(env for env in SETTINGS if env in set(runs.env))
    lines = []
    for env, axis in axes.items():
        found = common.means(runs[runs.env == env])
        rows = []
        for has_ewma in (False, True):
            fresh = found.get(name_of(MODES[0], 0, has_ewma))
            for mode, color in zip(MODES, common.COLORS, strict=False):
                names = {s: name_of(mode if s else MODES[0], s, has_ewma) for s in STALENESS}
                there = {s: found[name] for s, name in names.items() if name in found}
                axis.errorbar(
                    [str(s) for s in there],
                    [point.value for point in there.values()],
                    yerr=[
                        [point.value - point.low for point in there.values()],
                        [point.high - point.value for point in there.values()],
                    ],
                    color=color,
                    linestyle="--" if has_ewma else "-",
                    capsize=2,
                    label=mode + (", EWMA" if has_ewma else ""),
                )
                kept = there[4].value / fresh.value if fresh is not None and 4 in there else float("nan")
                cells = [there.get(s, "") for s in STALENESS]
                rows.append([mode, "yes" if has_ewma else "no", *cells, f"{100 * kept:.0f} %"])
        axis.set(xlabel="staleness in iterations", ylabel="normalised final return", ylim=(-0.1, 1.3))
        headings = ["mode", "EWMA", *map(str, STALENESS), "kept at 4"]
        lines += ["", f"## {env}", "", *common.table(headings, rows)]
    next(iter(axes.values())).legend(frameon=False, fontsize="small")
    intro = [
        "Final return of the training episodes in the last tenth of training, normalised: 0 is the untrained policy, 1 "
        "the mean of fresh data without EWMA. Kept at 4: mean at a staleness of 4 iterations, as a share of the fresh "
        "mean with the same EWMA.",
        "",
        common.save(figure, file),
    ]
    common.write(file, "Stale data", [*intro, *lines])


def main() -> None:
    quick: dict[str, Any] = {"n_timesteps": 2000, "n_envs": 4, "n_steps": 16, "batch_size": 16, "staleness": 1}
    execute(parser(__doc__, "staleness", N_SEEDS).parse_args(), variants(), quick, report, QUICK_NAMES)


if __name__ == "__main__":
    main()
