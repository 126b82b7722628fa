"""A two-layer random Llama with a small tokenizer, on disk."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import save_tiny

from llmtuner.hparams.model import ModelArgs


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untied fp32 model; read only."""
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny-llama")


@pytest.fixture(scope="session")
def tied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose head is its embedding; read only."""
    return save_tiny(tmp_path_factory.mktemp("model") / "tied-llama", tie_word_embeddings=True)


@pytest.fixture
def args_of() -> Callable[..., ModelArgs]:
    def build(folder: Path, **changes: object) -> ModelArgs:
        return ModelArgs(model_name_or_path=str(folder), **changes)

    return build
