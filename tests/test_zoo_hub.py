"""The Hugging Face Hub, against a fake one."""

import importlib
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import rl_zoo3.utils
import yaml
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from huggingface_sb3 import EnvironmentName, ModelName

from sb3_ppo_ewma import zoo

pytestmark = pytest.mark.long

TRAIN = ["--algo", "ppo_ewma", "-f", "logs", "-n", "64", "--eval-freq", "-1", "--device", "cpu", "--seed", "0"]
SMALL = ["n_envs:1", "n_steps:32", "batch_size:16", "n_epochs:1"]


class FakeHub:
    """Keeps uploaded folders by the name of their repository."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def create_repo(self, repo_id: str, **kwargs: Any) -> str:
        (self.folder / repo_id).mkdir(parents=True)
        return f"https://hub/{repo_id}"

    def snapshot_download(self, repo_id: str, local_dir: Path) -> None:
        shutil.copytree(self.folder / repo_id, local_dir)

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> None:
        shutil.copytree(folder_path, self.folder / repo_id, dirs_exist_ok=True)

    def hf_hub_download(self, repo_id: str, filename: str, **kwargs: Any) -> str:
        file = self.folder / repo_id / filename
        if not file.is_file():
            raise EntryNotFoundError(f"no {filename} in {repo_id}")
        return str(file)

    def list_models(self, author: str, **kwargs: Any) -> list[SimpleNamespace]:
        cards = [huggingface_hub.ModelCard.load(folder / "README.md") for folder in (self.folder / author).iterdir()]
        return [SimpleNamespace(id="", card_data=card.data.to_dict()) for card in cards]


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    hub = FakeHub(tmp_path / "hub_server")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(rl_zoo3.utils, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub.hf_hub_download)
    monkeypatch.setenv("TRUST_REMOTE_CODE", "True")
    return hub


@pytest.mark.parametrize(
    ("algo", "class_name", "normalize"),
    [("ppo_ewma", "PPOEWMA", False), ("ppo_ewma", "PPOEWMA", True), ("ppg_ewma", "PPGEWMA", False)],
)
def test_push_list_load_and_watch(algo, class_name, normalize, fake_hub, capsys):
    zoo.main(["train", *TRAIN, "--algo", algo, "-params", *SMALL, f"normalize:{normalize}"])
    zoo.main(["push_to_hub", "--algo", algo, "--env", "CartPole-v1", "-f", "logs", "-orga", "me", "--no-render"])
    repository = fake_hub.folder / "me" / f"{algo}-CartPole-v1"
    assert (repository / f"{algo}-CartPole-v1.zip").is_file()
    card = (repository / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    (result,) = metadata["model-index"][0]["results"]
    assert metadata["model-index"][0]["name"] == class_name
    assert result["dataset"]["name"] == "CartPole-v1"
    assert float(result["metrics"][0]["value"].split(" ")[0]) > 0
    assert f"python -m sb3_ppo_ewma.zoo enjoy --algo {algo} --env CartPole-v1" in card
    assert "rl_zoo3." not in card

    assert rl_zoo3.utils.get_hf_trained_models("me") == {
        ModelName(algo, EnvironmentName("CartPole-v1")): (algo, "CartPole-v1")
    }

    zoo.main(["load_from_hub", "--algo", algo, "--env", "CartPole-v1", "-f", "downloads", "-orga", "me"])
    assert ("No normalization file" in capsys.readouterr().out) is not normalize
    zoo.main(["enjoy", "--algo", algo, "-f", "downloads", "-n", "600", "--no-render"])
    assert "Mean reward:" in capsys.readouterr().out


def test_enjoy_says_why_it_could_not_download(fake_hub):
    with pytest.raises(SystemExit, match=r"no trained ppo_ewma agent .* failed: no ppo_ewma-CartPole-v1.zip in sb3/"):
        zoo.main(["enjoy", "--algo", "ppo_ewma"])


def test_a_hub_out_of_reach_is_no_missing_file(fake_hub, monkeypatch):
    def unreachable(**kwargs):
        raise LocalEntryNotFoundError("offline")

    zoo.register()
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    load_from_hub = importlib.import_module("huggingface_sb3").load_from_hub
    with pytest.raises(LocalEntryNotFoundError):
        load_from_hub("me/ppo_ewma-CartPole-v1", "vec_normalize.pkl")
