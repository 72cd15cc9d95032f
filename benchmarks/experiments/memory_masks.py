"""
Tasks that need memory, and action masks as well: recurrent and masked algorithms, alone and combined. From the root of
the repository:

    python -m benchmarks.experiments.memory_masks --jobs 2

Runs that are in results/memory_masks.csv are not repeated.
"""

from pathlib import Path
from typing import Any

from benchmarks.experiments.environments import CUE, CUE_DOORS
from benchmarks.experiments.runs import Variant, execute, parser

N_SEEDS = 3
QUICK_ENV = CUE_DOORS
SETTINGS: dict[str, Any] = {
    "n_timesteps": 30_000,
    "n_envs": 8,
    "n_steps": 128,
    "batch_size": 256,
    "n_epochs": 10,
    "learning_rate": 1e-3,
    "gamma": 0.99,
    "gae_lambda": 0.98,
    "ent_coef": 0.01,
}
PHASE: dict[str, Any] = {"n_policy_iterations": 8, "aux_batch_size": 1024, "aux_learning_rate": 1e-3}
LSTM: dict[str, Any] = {"policy": "MlpLstmPolicy", "policy_kwargs": "dict(lstm_hidden_size=32)"}
MLP: dict[str, Any] = {"policy": "MlpPolicy"}
# By environment: the class of each variant, with its policy and phase; the first one has all that the task needs
BOTH, MEMORY, MASKS = "PPO-EWMA, memory and masks", "PPO-EWMA, memory alone", "PPO-EWMA, masks alone"
ALGORITHMS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    CUE_DOORS: {
        BOTH: ("MaskableRecurrentPPOEWMA", LSTM),
        "PPG-EWMA, memory and masks": ("MaskableRecurrentPPGEWMA", {**LSTM, **PHASE}),
        MEMORY: ("RecurrentPPOEWMA", LSTM),
        MASKS: ("MaskablePPOEWMA", MLP),
    },
    CUE: {
        "PPG, memory": ("RecurrentPPG", {**LSTM, **PHASE}),
        "PPG-EWMA, memory": ("RecurrentPPGEWMA", {**LSTM, **PHASE}),
        "PPO-EWMA, memory": ("RecurrentPPOEWMA", LSTM),
        "PPG, no memory": ("PPG", {**MLP, **PHASE}),
    },
}
TASKS = {
    CUE_DOORS: "An episode has five rooms of 24 doors. Its first observation shows a cue, one of four, which tells the "
    "right door of the last room. In the other rooms two doors are open, drawn at every step; observations show them, "
    "and masks leave only them. A closed door costs 0.05 and one of the 20 steps that an episode can have; the right "
    "door at the end has a reward of 1. An agent without memory finds it in a quarter of the episodes.",
    CUE: "The same rooms with four doors that are always open: only the cue has to be remembered.",
}


def variants() -> list[Variant]:
    """
    :return: every algorithm of every task
    """
    return [
        Variant(env, name, algorithm, {**SETTINGS, **further})
        for env, algorithms in ALGORITHMS.items()
        for name, (algorithm, further) in algorithms.items()
    ]


def report(file: Path) -> None:
    # Here, so that training does not need what reports do.
    from benchmarks.experiments import report as common

    runs = common.load(file)
    figure, axes = common.panels(env for env in ALGORITHMS if env in set(runs.env))
    lines = []
    for env, axis in axes.items():
        there, names = runs[runs.env == env], {name: name for name in ALGORITHMS[env]}
        common.plot_curves(axis, there, names)
        axis.legend(frameon=False, fontsize="small")
        returns = common.scores(there.assign(score=there.final_return))
        means = common.means(there.assign(score=there.final_return))
        first = next(iter(names))
        rows = [
            [
                f"{name}, `{ALGORITHMS[env][name][0]}`",
                len(returns[name]),
                means[name],
                common.difference(returns[first], returns[name]) if name != first and first in returns else "",
            ]
            for name in names
            if name in returns
        ]
        headings = ["", "runs", "final return", "difference from the first row"]
        lines += ["", f"## {env}", "", TASKS[env], "", *common.table(headings, rows)]
    intro = [
        "Two tasks that need memory; in one of them most actions are invalid. Final return: mean of the training "
        "episodes that ended in the last tenth of training, with sampled actions. All variants share the settings, "
        "which pilot runs with memory and masks together decided.",
        "",
        common.save(figure, file),
    ]
    common.write(file, "Memory and masks", [*intro, *lines])


def main() -> None:
    quick: dict[str, Any] = {"n_timesteps": 1000, "n_envs": 2, "n_steps": 16, "batch_size": 16, "n_epochs": 1}
    args = parser(__doc__, "memory_masks", N_SEEDS).parse_args()
    execute(args, variants(), quick, report, quick_env=QUICK_ENV)


if __name__ == "__main__":
    main()
