"""A benchmark on disk in the layouts that people have, and a tiny model to ask."""

import csv
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

MARKS = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADER = ["id", "question", "A", "B", "C", "D", "answer"]
SUBJECTS = ("anatomy", "law")
FILES = {"dev": 5, "val": 7, "test": 3}


def rows(subject: str, split: str, count: int) -> list[list[str]]:
    return [
        [str(n), f"{subject} {split} {n}{'?' * n}", *(f"{c}{n}" for c in "abcd"), "ABCD"[n % 4]]
        for n in range(count)
    ]


def write_csv(path: Path, table: Sequence[Sequence[str]], header: Sequence[str] = HEADER) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *table] if header else table)


def write_benchmark(folder: Path, *, name: str = "ceval", labels: bool = True) -> Path:
    """Write `folder/<name>` with two subjects; without labels, test has no answer column."""
    for subject in SUBJECTS:
        for split, count in FILES.items():
            table = rows(subject, split, count)
            header = HEADER
            if split == "test" and not labels:
                table, header = [row[:-1] for row in table], HEADER[:-1]
            write_csv(folder / name / split / f"{subject}_{split}.csv", table, header)
    mapping = {
        "anatomy": {"name": "Anatomy", "category": "STEM"},
        "law": {"name": "Law", "category": "Social Sciences"},
        "art": {"name": "Art", "category": "Humanities"},
    }
    (folder / name / "mapping.json").write_text(json.dumps(mapping))
    return folder / name


def zip_folder(folder: Path, target: Path) -> Path:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder))
    return target


def chat_tokenizer(*merges: tuple[str, str]) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*MARKS, *alphabet, *("".join(pair) for pair in merges)]
    vocabulary = {token: number for number, token in enumerate(words)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|pad|>", eos_token="<|im_end|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def save_model(folder: Path, *, context: int = 4096) -> Path:
    torch.manual_seed(3)
    tokenizer = chat_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
