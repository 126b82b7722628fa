"""The tokenizer that training, serving and export share."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from llmtuner.extras.errors import ModelError
from llmtuner.hparams.model import ModelArgs
from llmtuner.model.tokenizer import load_tokenizer

ArgsOf = Callable[..., ModelArgs]


def test_marks_are_single_tokens_and_text_survives(tiny_model: Path, args_of: ArgsOf) -> None:
    tokenizer = load_tokenizer(args_of(tiny_model))
    text = "<|im_start|>人参 ginseng<|im_end|>"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert (ids[0], ids[-1]) == (1, 2)
    assert tokenizer.decode(ids) == text


def test_padding_falls_back_to_the_end_token(tiny_model: Path, args_of: ArgsOf) -> None:
    assert load_tokenizer(args_of(tiny_model)).pad_token == "<|im_end|>"


def test_added_tokens(tiny_model: Path, args_of: ArgsOf) -> None:
    args = args_of(tiny_model, add_tokens=("针灸",), add_special_tokens=("<|herb|>",))
    tokenizer = load_tokenizer(args)
    assert len(tokenizer("针灸").input_ids) == 1
    ids = tokenizer("<|herb|>针灸").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "针灸"
    assert len(tokenizer) == len(load_tokenizer(args_of(tiny_model))) + 2


def test_folder_without_tokenizer(tiny_model: Path, tmp_path: Path, args_of: ArgsOf) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(tiny_model / "config.json", folder)
    with pytest.raises(ModelError, match="tokenizer") as caught:
        load_tokenizer(args_of(folder))
    assert "\n" not in str(caught.value)
