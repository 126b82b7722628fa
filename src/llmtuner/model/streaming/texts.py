"""The files beside the weights: configuration, tokenizer, chat template, stop ids.

They are copied as they are; only what the export itself changes is written anew.
"""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmtuner.extras.errors import ModelError
from llmtuner.extras.files import read_json, write_json, write_text
from llmtuner.extras.logs import get_logger
from llmtuner.model.streaming.base_files import BaseFiles

logger = get_logger(__name__)

GENERATION_FILE = "generation_config.json"
TEMPLATE_FILE = "chat_template.jinja"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")
_TOKENIZER_FILES = (
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
    *_VOCABULARIES,
)
# Of the base: code of models that bring their own (copied, never run), inputs other than text,
# and the terms of use.
_BASE_FILES = ("*.py", "*processor_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*")


def tokenizer_folder(base: Path, adapters: Sequence[Path]) -> Path:
    """Return whose tokenizer the result gets: the newest adapter's that has one, else the base's.

    Raises:
        ModelError: the folder has no vocabulary.
    """
    with_one = [folder for folder in adapters if (folder / _TOKENIZER_CONFIG).is_file()]
    folder = with_one[-1] if with_one else base
    if not any(True for pattern in _VOCABULARIES for _ in folder.glob(pattern)):
        raise ModelError(
            "The folder has no tokenizer.",
            where=str(folder),
            got=sorted(path.name for path in folder.iterdir()),
            allowed="tokenizer.json, tokenizer.model or vocab.json",
            fix="copy the base model's tokenizer files into the folder",
        )
    return folder


def check_vocabulary(folder: Path, *, num_rows: int, wanted: Iterable[str]) -> None:
    """Check that every token has a row of the embedding, and that wanted tokens are there.

    Only `tokenizer.json` is read; older kinds of tokenizers are taken as they are.

    Args:
        folder: of the tokenizer.
        num_rows: rows of the embedding.
        wanted: tokens that the user says were added.

    Raises:
        ModelError: the tokenizer does not fit the weights.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return
    ids = _token_ids(path)
    largest = max(ids.values(), default=0)
    if largest >= num_rows:
        raise ModelError(
            "The tokenizer has more tokens than the model has embeddings.",
            where=str(folder),
            got=f"token id {largest}, {num_rows} embeddings",
            fix="give the adapter that the added tokens were trained with",
        )
    absent = [token for token in wanted if token not in ids]
    if absent:
        raise ModelError(
            "Tokens can only be exported after they were trained.",
            where=str(folder),
            got=absent,
            fix="train with --add_tokens or --add_special_tokens, and export that adapter",
        )


def copy_texts(
    target: Path,
    *,
    base: Path,
    adapters: Sequence[Path],
    template_text: str | None,
    stop_ids: Sequence[int],
) -> None:
    """Copy what the model needs beside its weights and `config.json`.

    Args:
        target: the new folder.
        base: the base model's folder.
        adapters: in order; the newest with a tokenizer or stop ids wins.
        template_text: another chat template; None keeps the tokenizer's.
        stop_ids: ids that end a turn of that template; empty keeps those of base and adapters.
    """
    _copy(base, target, _BASE_FILES)
    _copy(tokenizer_folder(base, adapters), target, _TOKENIZER_FILES)
    if template_text is not None:
        _set_template(target, template_text)
    for folder in reversed([base, *adapters]):
        if (folder / GENERATION_FILE).is_file():
            shutil.copyfile(folder / GENERATION_FILE, target / GENERATION_FILE)
            break
    if stop_ids:
        path = target / GENERATION_FILE
        settings = read_json(path) if path.is_file() else {}
        write_json(path, {**settings, "eos_token_id": list(stop_ids)})


def write_config(
    target: Path,
    base: BaseFiles,
    *,
    dtype: str,
    vocabulary_rows: int | None,
    is_untied: bool,
    changes: Mapping[str, Any],
) -> None:
    """Write the base's `config.json` with what the export changed.

    Args:
        target: the new folder.
        base: the base model's files.
        dtype: type of the weights, as "bfloat16".
        vocabulary_rows: rows of a grown embedding.
        is_untied: the head is not the embedding any more.
        changes: other settings of the language model.
    """
    config = json.loads(json.dumps(base.config))
    config.pop("_name_or_path", None)
    text = config.get("text_config") if base.text_config is not base.config else config
    for level in (config, text):
        for name in ("torch_dtype", "dtype"):
            if name in level:
                level[name] = dtype
        if vocabulary_rows is not None and (level is text or "vocab_size" in level):
            level["vocab_size"] = vocabulary_rows
        if is_untied:
            level["tie_word_embeddings"] = False
    if not {"torch_dtype", "dtype"} & set(config):
        config["dtype"] = dtype
    text.update(changes)
    write_json(target / "config.json", config)


def stop_ids_of(folder: Path) -> list[int]:
    """Return the ids at which generation with a model folder stops."""
    for name in (GENERATION_FILE, "config.json"):
        path = folder / name
        stops = read_json(path).get("eos_token_id") if path.is_file() else None
        if stops is not None:
            return list(stops) if isinstance(stops, list) else [stops]
    return []


def chat_template_of(folder: Path) -> str | None:
    """Return the chat template of a saved tokenizer, None if it has none or several."""
    path = folder / TEMPLATE_FILE
    if path.is_file():
        return path.read_text(encoding="utf-8")
    path = folder / _TOKENIZER_CONFIG
    found = read_json(path).get("chat_template") if path.is_file() else None
    return found if isinstance(found, str) else None


def _copy(source: Path, target: Path, patterns: Iterable[str]) -> None:
    for path in sorted({path for pattern in patterns for path in source.glob(pattern)}):
        if path.is_file():
            place = target / path.relative_to(source)
            place.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, place)


def _set_template(folder: Path, text: str) -> None:
    """Make `text` the only template: a second one in another file could win in other programs."""
    write_text(folder / TEMPLATE_FILE, text)
    (folder / "chat_template.json").unlink(missing_ok=True)
    shutil.rmtree(folder / "additional_chat_templates", ignore_errors=True)
    path = folder / _TOKENIZER_CONFIG
    if path.is_file():
        config = read_json(path)
        if config.pop("chat_template", None) is not None:
            write_json(path, config)


def _token_ids(path: Path) -> dict[str, int]:
    try:
        content = read_json(path)
        vocabulary = (content.get("model") or {}).get("vocab") or {}
        # Unigram models list [token, score] pairs, the others map tokens to ids.
        pairs = vocabulary.items() if isinstance(vocabulary, dict) else ()
        ids = {token: int(number) for token, number in pairs}
        if not isinstance(vocabulary, dict):
            ids = {token: number for number, (token, _) in enumerate(vocabulary)}
        ids |= {entry["content"]: int(entry["id"]) for entry in content.get("added_tokens") or ()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(
            f"The tokenizer is damaged ({error!r}).",
            where=str(path),
            fix="copy it from the base model again",
        ) from error
    return ids
