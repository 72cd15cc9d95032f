"""Learning curves as files."""

import csv
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COLUMNS = ["env_steps", "episode_reward_mean", "n_episodes", "seconds", "stepping_seconds", "training_seconds"]


@dataclass
class Curve:
    """
    What a run has come to, and how: two files, ``.csv`` and ``.json``.

    :param settings: hyper-parameters; ``None``: there is nothing yet
    :param starts: circumstances of every training, each of which went on where the one before had a checkpoint
    :param rows: by ``COLUMNS``, of the steps between the row before and ``env_steps``
    """

    settings: dict[str, Any] | None = None
    starts: list[dict[str, Any]] = field(default_factory=list)
    rows: list[dict[str, float]] = field(default_factory=list)

    @property
    def n_steps(self) -> int:
        return int(self.rows[-1]["env_steps"]) if self.rows else 0

    @classmethod
    def read(cls, name: Path) -> "Curve":
        """
        :param name: of the files, without suffix
        :return: what is there
        """
        if not _with_suffix(name, ".csv").is_file():
            return cls()
        with _with_suffix(name, ".csv").open(newline="") as lines:
            rows = [{column: float(value) for column, value in row.items()} for row in csv.DictReader(lines)]
        return cls(rows=rows, **json.loads(_with_suffix(name, ".json").read_text()))

    def write(self, name: Path) -> None:
        """
        :param name: of the files, without suffix
        """
        name.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"settings": self.settings, "starts": self.starts}, indent=1) + "\n"
        lines = [",".join(COLUMNS), *(",".join(f"{row[column]:.10g}" for column in COLUMNS) for row in self.rows), ""]
        for suffix, text in ((".json", content), (".csv", "\n".join(lines))):
            temporary = _with_suffix(name, ".tmp")
            temporary.write_text(text)
            temporary.replace(_with_suffix(name, suffix))


def _with_suffix(name: Path, suffix: str) -> Path:
    return name.with_name(name.name + suffix)
