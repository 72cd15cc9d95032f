"""
Training on data that is several iterations old: decoupled policies against the two couplings, without and with an EWMA.
From the root of the repository:

    python -m benchmarks.experiments.staleness --jobs 2

Runs that are in results/staleness.csv are not repeated.
"""

from pathlib import Path
from typing import Any

from benchmarks.experiments.runs import Variant, execute, parser
from sb3_ppo_ewma.ewma import decay_from_center_of_mass

N_SEEDS = 5
STALENESS = [0, 1, 2, 4, 8, 16]
MODES = ["decoupled", "behavior", "proximal"]
# In iterations, where the share of what is left is reported
KEPT_AT = 4
MEASURES = {"final": "final_return", "mean": "mean_return"}
# Like the paper's PPO: 3 epochs of 8 minibatches. Many short iterations, so that 16 of them are a small part of a run.
# Twice as many steps were tried for Acrobot, with one seed: all modes end alike there up to a staleness of 4
# iterations, however much later they learn, for -80 is as good as it gets.
SETTINGS: dict[str, dict[str, Any]] = {
    "Acrobot-v1": {
        "policy": "MlpPolicy",
        "normalize": True,
        "n_timesteps": 100_000,
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


# Age of the proximal policy: suffix of a variant's name, prox_decay, modes. An epoch has 8 gradient steps, an iteration
# 24. With an EWMA, "decoupled" and "behavior" are the same.
EWMAS: dict[str, tuple[str, Any, list[str]]] = {
    "no": ("", None, MODES),
    "an epoch's": (", EWMA", decay_from_center_of_mass(8), MODES),
    "an iteration's": (", older EWMA", decay_from_center_of_mass(24), MODES[:1]),
}


def name_of(mode: str, staleness: int, ewma: str) -> str:
    # Without staleness the modes are the same.
    return f"{mode if staleness else MODES[0]}, {staleness}{EWMAS[ewma][0]}"


def variants() -> list[Variant]:
    """
    :return: all modes with every staleness, without and with EWMA; each makes as many gradient steps, so that the
        iterations that wait in the queue come on top of the budget
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
                    name_of(mode, staleness, ewma),
                    "ppo_ewma",
                    {**settings, **changed, "staleness_mode": mode, "prox_decay": prox_decay},
                )
                for ewma, (_, prox_decay, modes) in EWMAS.items()
                for mode in (modes if staleness > 0 else MODES[:1])
            ]
    return found


def report(file: Path) -> None:
    # Here, so that training does not need what reports do.
    from benchmarks.experiments import report as common

    runs = common.load(file)
    envs = [env for env in SETTINGS if env in set(runs.env)]
    figure, axes = common.panels((f"{env}, {label} return" for label in MEASURES for env in envs), len(envs))
    lines = []
    for env in envs:
        lines += ["", f"## {env}"]
        for label, column in MEASURES.items():
            scored = common.normalized(runs[runs.env == env], UNTRAINED, FRESH, column)
            scores, means = common.scores(scored), common.means(scored)
            axis = axes[f"{env}, {label} return"]
            rows = []
            for ewma, mode in ((ewma, mode) for ewma, (*_, modes) in EWMAS.items() for mode in modes):
                names = {s: name_of(mode, s, ewma) for s in STALENESS}
                there = {s: means[name] for s, name in names.items() if name in means}
                plot(axis, there, mode, ewma)
                pair = [scores[names[s]] for s in (0, KEPT_AT) if s in there]
                kept = common.share(*pair) if len(pair) == 2 else ""
                rows.append([mode, ewma, *(there.get(s, "") for s in STALENESS), kept])
            axis.set(xlabel="staleness in iterations", ylabel=f"normalised {label} return", ylim=(-0.2, 1.4))
            headings = ["mode", "EWMA", *map(str, STALENESS), f"kept at {KEPT_AT}"]
            lines += ["", f"Normalised {label} return:", "", *common.table(headings, rows)]
    handles = next(iter(axes.values())).get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    intro = [
        "Final return: of the training episodes in the last tenth of training; mean return: of all of training. Both "
        "are normalised: 0 is the untrained policy, 1 the mean of fresh data without EWMA. "
        f"Kept at {KEPT_AT}: what is left at a staleness of {KEPT_AT} iterations, as a share of fresh data with the "
        "same EWMA. EWMA: the age of the average; with one, `decoupled` and `behavior` are the same.",
        "",
        common.save(figure, file),
    ]
    common.write(file, "Stale data", [*intro, *lines])


def plot(axis: Any, points: dict[int, Any], mode: str, ewma: str) -> None:
    """
    :param axis: to draw on
    :param points: estimate by staleness
    :param mode: of staleness
    :param ewma: age of the EWMA
    """
    from benchmarks.experiments.report import COLORS

    values = list(points.values())
    axis.errorbar(
        [str(staleness) for staleness in points],
        [point.value for point in values],
        yerr=[[point.value - point.low for point in values], [point.high - point.value for point in values]],
        color=COLORS[MODES.index(mode)],
        linestyle=["-", "--", ":"][list(EWMAS).index(ewma)],
        capsize=2,
        label=mode + EWMAS[ewma][0],
    )


def main() -> None:
    quick: dict[str, Any] = {"n_timesteps": 2000, "n_envs": 4, "n_steps": 16, "batch_size": 16, "staleness": 1}
    execute(parser(__doc__, "staleness", N_SEEDS).parse_args(), variants(), quick, report, QUICK_NAMES)


if __name__ == "__main__":
    main()
