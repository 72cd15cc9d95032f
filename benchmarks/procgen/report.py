"""Curves over the published ones and what the trainings took, from the stored files alone."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from benchmarks.experiments import report as common
from benchmarks.metadata import command
from benchmarks.procgen.curves import Curve

HERE = Path(__file__).parent
# Steps over which a published number is averaged
WINDOW = 2**20
PUBLISHED = {"ppo": "PPO", "ppg": "PPG", "ppgkl": "PPG with KL penalty"}
# The published algorithm that stands beside one of ours
BESIDE = {"ppo": "ppo", "ppo_ewma": "ppo", "ppg": "ppg", "ppg_ewma": "ppg", "ppg_kl": "ppgkl", "ppg_ewma_kl": "ppgkl"}
NAMES = {"ppo": "PPO", "ppo_ewma": "PPO-EWMA", "ppg": "PPG", "ppg_ewma": "PPG-EWMA"}
NAMES |= {f"{name}_kl": f"{title} with KL penalty" for name, title in list(NAMES.items())}
COLORS = dict(zip(NAMES, common.COLORS, strict=False))
# Return of a policy that acts by chance, or does not see, and the greatest possible or practical one, of the hard
# games: Cobbe, Hesse, Hilton, Schulman 2020, https://arxiv.org/abs/1912.01588, appendix C
RANGES = {
    "bigfish": (0, 40), "bossfight": (0.5, 13), "caveflyer": (2, 13.4), "chaser": (0.5, 14.2), "climber": (1, 12.6),
    "coinrun": (5, 10), "dodgeball": (1.5, 19), "fruitbot": (-0.5, 27.2), "heist": (2, 10), "jumper": (1, 10),
    "leaper": (1.5, 10), "maze": (4, 10), "miner": (1.5, 20), "ninja": (2, 10), "plunder": (3, 30),
    "starpilot": (1.5, 35),
}  # fmt: skip
OVERALL = "mean of the games, normalised"


def report(folder: Path) -> None:
    """
    :param folder: of the curves, in which the report is written
    """
    names = sorted(path.stem for path in folder.glob("*.csv"))
    stored = [(name, curve) for name in names if (curve := Curve.read(folder / name)).rows]
    if not stored:
        print(f"No runs in {folder}")
        return
    rows = pd.concat([_rows(name, curve) for name, curve in stored], ignore_index=True)
    n_envs = sorted(rows.n_envs.unique())
    returns = windows(rows)
    published = pd.read_csv(HERE / "published_curves.csv")
    lines = [
        "# Procgen, hard games",
        "",
        f"Written by `{command()}` from the files beside it; not edited. Returns of training episodes, from all "
        f"levels; {' and '.join(map(str, n_envs))} environments. Dashed: published with PPG, [arXiv 2009.04416]"
        "(https://arxiv.org/abs/2009.04416), three runs with 256 environments in four processes; there are no "
        "published curves of the EWMA variants. Range: least and greatest run.",
        "",
        plot(returns, published, folder / "curves.csv"),
        "",
        "## At equal steps",
        "",
        *table_of_returns(returns, published),
        "",
        "## Speed",
        "",
        "Median of the rows of all runs. Stepping: the environments, without what wraps them. Training: gradient steps "
        "and auxiliary phases. The limit is what the passes of the networks alone would allow, back to back, without "
        "losses, optimisers, copies and environments.",
        "",
        *table_of_speed(rows),
        "",
        "## How it was measured",
        "",
        "The `.json` of each run has its settings.",
        "",
        *(
            f"- {name}, steps {start['from_step']} to {start['to_step']}: `{start['command']}`, begun {start['date']}, "
            f"{start['device']}, jobs: {start['jobs']}; {common.circumstances(start)}"
            for name, curve in stored
            for start in curve.starts
        ),
        "",
    ]
    text = "\n".join(lines)
    (folder / "README.md").write_text(text)
    print(text)


def _rows(name: str, curve: Curve) -> pd.DataFrame:
    """
    :param name: of a run
    :param curve: its
    :return: a row of the curve each, with how far it is from the one before, device and limit
    """
    algorithm, _, game, seed = name.rsplit("_", 3)
    rows = pd.DataFrame(curve.rows)
    rows["steps"] = rows.env_steps.diff().fillna(rows.env_steps)
    for start in curve.starts:
        of_start = rows.env_steps.between(start["from_step"] + 1, start["to_step"])
        rows.loc[of_start, "device"] = start["device"]
        rows.loc[of_start, "network_steps_per_second"] = start["network_steps_per_second"]
    n_envs = (curve.settings or {})["n_envs"]
    return rows.assign(algorithm=algorithm, n_envs=n_envs, game=game, run=int(seed))


def windows(rows: pd.DataFrame, size: int = WINDOW) -> pd.DataFrame:
    """
    :param rows: of all runs
    :param size: of the published windows, in steps
    :return: mean return of the episodes that ended in each window, by its last step; a window that did not end is left
        out. Of runs that are shorter than a window, all of it
    """
    found = []
    for keys, run in rows.groupby(["algorithm", "n_envs", "game", "run"]):
        n_steps = run.env_steps.max()
        number = np.ceil(run.env_steps / size)
        complete = run[number * size <= n_steps] if n_steps >= size else run
        sums = (complete.episode_reward_mean * complete.n_episodes).groupby(number).sum()
        means = sums / complete.n_episodes.groupby(number).sum()
        steps = means.index * size if n_steps >= size else [n_steps]
        table = {"env_steps": np.asarray(steps, dtype=float), "episode_reward_mean": means.to_numpy()}
        found.append(pd.DataFrame(table).assign(**dict(zip(["algorithm", "n_envs", "game", "run"], keys, strict=True))))
    return pd.concat(found, ignore_index=True)


def normalized(returns: pd.DataFrame) -> pd.DataFrame:
    """
    :param returns: by game
    :return: with returns between 0 and 1
    """
    low, high = (returns.game.map({game: limits[i] for game, limits in RANGES.items()}) for i in (0, 1))
    return returns.assign(episode_reward_mean=(returns.episode_reward_mean - low) / (high - low))


def plot(returns: pd.DataFrame, published: pd.DataFrame, file: Path) -> str:
    """
    :param returns: ours, in windows
    :param published: in windows
    :param file: with whose name the figure is written
    :return: its line of Markdown
    """
    games = [game for game in RANGES if game in set(returns.game)]
    complete = all(set(group.game) == set(games) for _, group in returns.groupby(["algorithm", "n_envs", "run"]))
    names = [*games, *([OVERALL] if len(games) > 1 and complete else [])]
    figure, axes = common.panels(names, n_columns=4)
    for game in games:
        _plot_game(axes[game], returns[returns.game == game], published[published.game == game])
    if OVERALL in axes:
        ours, theirs = (_overall(each, games) for each in (returns, published))
        _plot_game(axes[OVERALL], ours, theirs)
    axes[names[0]].legend(frameon=False, fontsize="small")
    return common.save(figure, file)


def _overall(returns: pd.DataFrame, games: Iterable[str]) -> pd.DataFrame:
    scores = normalized(returns[returns.game.isin(games)])
    keys = [name for name in ("algorithm", "n_envs", "run", "env_steps") if name in scores]
    by_step = scores.groupby(keys).episode_reward_mean.agg(["mean", "size"])
    by_step = by_step[by_step["size"] == len(list(games))]  # where all games have come to
    return by_step["mean"].rename("episode_reward_mean").reset_index()


def _plot_game(axis: Axes, returns: pd.DataFrame, published: pd.DataFrame) -> None:
    last = returns.env_steps.max()
    several = returns.n_envs.nunique() > 1
    beside = dict.fromkeys(BESIDE[name] for name in returns.algorithm.unique() if name in BESIDE)
    for name in beside:
        ours = next(algorithm for algorithm, theirs in BESIDE.items() if theirs == name)
        curve = published[(published.algorithm == name) & (published.env_steps <= max(last, WINDOW))]
        mean = curve.groupby("env_steps").episode_reward_mean.mean()
        axis.plot(mean.index / 1e6, mean, "--", color=COLORS[ours], alpha=0.6, label=f"{PUBLISHED[name]}, published")
    for (algorithm, n_envs), group in returns.groupby(["algorithm", "n_envs"], sort=False):
        by_step = group.groupby("env_steps").episode_reward_mean.agg(["mean", "min", "max"])
        label = NAMES[algorithm] + (f", {n_envs} environments" if several else "")
        style = ":" if several and n_envs == returns.n_envs.max() else "-"
        marker = "o" if len(by_step) == 1 else ""
        axis.plot(by_step.index / 1e6, by_step["mean"], style, marker=marker, color=COLORS[algorithm], label=label)
        axis.fill_between(
            by_step.index / 1e6, by_step["min"], by_step["max"], color=COLORS[algorithm], alpha=0.15, linewidth=0
        )
    axis.set(xlabel="million steps", ylabel="return")


def table_of_returns(returns: pd.DataFrame, published: pd.DataFrame) -> list[str]:
    """
    :param returns: ours, in windows
    :param published: in windows
    :return: lines of Markdown: the last window to which all runs of a game have come
    """
    rows: list[list[Any]] = []
    for game, group in returns.groupby("game"):
        steps = group.groupby(["algorithm", "n_envs", "run"]).env_steps.max().min()
        for (algorithm, n_envs), of_algorithm in group[group.env_steps == steps].groupby(["algorithm", "n_envs"]):
            theirs = published[
                (published.game == game)
                & (published.algorithm == BESIDE.get(algorithm))
                & (published.env_steps == steps)
            ].episode_reward_mean
            rows.append(
                [
                    game,
                    f"{int(steps):,}",
                    NAMES[algorithm],
                    n_envs,
                    len(of_algorithm),
                    _mean_and_range(of_algorithm.episode_reward_mean),
                    f"{PUBLISHED[BESIDE[algorithm]]} {_mean_and_range(theirs)}" if len(theirs) else "",
                ]
            )
    return common.table(["game", "steps", "algorithm", "environments", "runs", "return", "published"], rows)


def _mean_and_range(values: pd.Series) -> str:
    if len(values) == 1:
        return f"{values.iloc[0]:.2f}"
    return f"{values.mean():.2f} ({values.min():.2f} to {values.max():.2f})"


def table_of_speed(rows: pd.DataFrame) -> list[str]:
    """
    :param rows: of all runs
    :return: lines of Markdown
    """
    shares = rows.assign(
        steps_per_second=rows.steps / rows.seconds,
        stepping=rows.stepping_seconds / rows.seconds,
        training=rows.training_seconds / rows.seconds,
        of_limit=rows.steps / rows.seconds / rows.network_steps_per_second,
    )
    columns = ["steps_per_second", "stepping", "training", "network_steps_per_second", "of_limit"]
    medians = shares.groupby(["device", "algorithm", "n_envs"])[columns].median()
    return common.table(
        ["device", "algorithm", "environments", "steps per second", "stepping", "training", "limit", "of the limit"],
        [
            [
                device,
                NAMES[algorithm],
                n_envs,
                f"{each.steps_per_second:.0f}",
                f"{each.stepping:.0%}",
                f"{each.training:.0%}",
                f"{each.network_steps_per_second:.0f}",
                f"{each.of_limit:.0%}",
            ]
            for (device, algorithm, n_envs), each in medians.iterrows()
        ],
    )
