"""A tiny random chat model and small data files; every test runs the real command line on them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmtuner.cli.main import main

TEMPLATE = (
    "{%- for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUESTIONS = ["What helps against a cold", "What is ginseng", "你是谁", "How long should I sleep"]
ANSWERS = ["Rest and warm tea.", "A root used in tonics.", "我是岐黄助手。", "About eight hours."]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMTUNER_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a saved Llama of 60,000 random parameters with a ChatML tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([*QUESTIONS, *ANSWERS, "system user assistant"] * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with dataset_info.json, 24 chats `qa`, 4 chats `few` and 12 `texts`."""
    folder = tmp_path_factory.mktemp("data")
    rows = [
        {"instruction": f"{question} {number}?", "input": "", "output": answer}
        for number in range(6)
        for question, answer in zip(QUESTIONS, ANSWERS, strict=True)
    ]
    texts = [
        {"text": f"{answer} {question}. " * (1 + n)}
        for n, (question, answer) in enumerate([*zip(QUESTIONS, ANSWERS, strict=True)] * 3)
    ]
    files: dict[str, Any] = {"qa.json": rows, "few.json": rows[:4], "texts.json": texts}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    info = {
        "qa": {"file_name": "qa.json"},
        "few": {"file_name": "few.json"},
        "texts": {"file_name": "texts.json", "columns": {"prompt": "text"}},
    }
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    return folder


Train = Callable[..., Path]


@pytest.fixture
def train(model_dir: Path, data_dir: Path, tmp_path: Path) -> Train:
    """Return a function that runs `llmtuner train` and gives back the output folder."""

    def run(*flags: str, name: str = "out", dataset: str = "qa", code: int = 0) -> Path:
        output_dir = tmp_path / name
        argv = [
            "train", "--do_train", "--model_name_or_path", str(model_dir),
            "--dataset_dir", str(data_dir), "--dataset", dataset,
            "--output_dir", str(output_dir), "--per_device_train_batch_size", "4",
            "--learning_rate", "1e-2", "--lr_scheduler_type", "constant", "--logging_steps", "1",
            "--no_bf16", "--disable_tqdm", "true", *flags,
        ]  # fmt: skip
        assert main(argv) == code
        return output_dir

    return run


def losses(output_dir: Path) -> list[float]:
    """Return the training losses in `trainer_log.jsonl`."""
    lines = (output_dir / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))
