"""A minimal training command line, and a way to read every message of a refused one."""

from collections.abc import Callable
from pathlib import Path

import pytest

from llmtuner.extras.errors import ConfigErrors
from llmtuner.hparams.config import RunConfig
from llmtuner.hparams.parser import parse

BASE = ("--model_name_or_path", "m", "--dataset", "d", "--output_dir", "o", "--do_train")


@pytest.fixture
def train() -> Callable[..., RunConfig]:
    def run(*words: str) -> RunConfig:
        return parse("train", [*BASE, *words])

    return run


@pytest.fixture
def refused() -> Callable[..., str]:
    def run(*words: str, command: str = "train", base: bool = True) -> str:
        with pytest.raises(ConfigErrors) as caught:
            parse(command, [*(BASE if base else ()), *words])
        return str(caught.value)

    return run


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], str]:
    def run(name: str, text: str) -> str:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return run
