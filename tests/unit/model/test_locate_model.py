"""Names of models: folders, ModelScope's spelling, hub names."""

from pathlib import Path

import pytest

from llmtuner.extras.errors import ConfigError, ModelError
from llmtuner.hparams.model import ModelArgs
from llmtuner.model.hub import locate_model, spellings


@pytest.mark.parametrize(
    ("given", "on_disk"),
    [("Qwen3-1.7B", "Qwen3-1___7B"), ("Qwen3-1___7B", "Qwen3-1.7B"), ("plain", "plain")],
)
def test_modelscope_spelling(tmp_path: Path, given: str, on_disk: str) -> None:
    (tmp_path / on_disk).mkdir()
    args = ModelArgs(model_name_or_path=str(tmp_path / given))
    assert locate_model(args) == tmp_path / on_disk


def test_the_given_spelling_wins(tmp_path: Path) -> None:
    for name in ("a.b", "a___b"):
        (tmp_path / name).mkdir()
    assert spellings(str(tmp_path / "a___b"))[0] == tmp_path / "a___b"
    assert locate_model(ModelArgs(model_name_or_path=str(tmp_path / "a.b"))) == tmp_path / "a.b"


def test_missing_folder_lists_what_was_looked_for(tmp_path: Path) -> None:
    name = str(tmp_path / "Qwen3-1.7B")
    with pytest.raises(ModelError, match=r"1___7B") as caught:
        locate_model(ModelArgs(model_name_or_path=name))
    assert caught.value.exit_code == 4


def test_hub_name_without_network_is_one_message(tmp_path: Path) -> None:
    args = ModelArgs(model_name_or_path="owner/absent-model", cache_dir=str(tmp_path))
    with pytest.raises(ModelError, match="neither a folder here nor available") as caught:
        locate_model(args)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 4


def test_impossible_hub_name_is_one_message() -> None:
    with pytest.raises(ModelError, match="neither a folder"):
        locate_model(ModelArgs(model_name_or_path="owner/bad name!"))


def test_no_name_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="--model_name_or_path"):
        locate_model(ModelArgs())
