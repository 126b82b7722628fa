"""GPTQ: a merged model folder becomes a quantised one, calibrated on rows of the user's data."""

import importlib.util
import shutil
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTQConfig, PreTrainedTokenizerBase

from llmtuner.data.conversation import Conversation
from llmtuner.data.dataset_info import load_dataset_specs
from llmtuner.data.prompt import prepare_chat, unguarded
from llmtuner.data.records import BadRows
from llmtuner.data.rows import load_conversations
from llmtuner.data.template import Template
from llmtuner.extras.errors import ConfigError, MissingExtraError
from llmtuner.hparams.data import DataArgs
from llmtuner.hparams.export import ExportArgs
from llmtuner.inference.export_prompts import load_chat_template
from llmtuner.model.weights import weight_files

_LIBRARIES = ("gptqmodel", "optimum")


def check_can_quantise(export: ExportArgs) -> None:
    """Check what quantising needs, before anything is merged.

    Raises:
        MissingExtraError: a library is not installed.
        ConfigError: there are no texts to calibrate with.
    """
    for library in _LIBRARIES:
        if importlib.util.find_spec(library) is None:
            raise MissingExtraError(library, extra="gptq", needed_for="--export_quantization_bit")
    if export.export_quantization_dataset is None:
        raise ConfigError(
            "Quantising needs texts to measure the model on.",
            where="export_quantization_dataset",
            fix="give --export_quantization_dataset a data set or file like those trained on",
        )


def quantise_export(folder: Path, export: ExportArgs, data: DataArgs) -> None:
    """Quantise the weights of a model folder in place.

    Args:
        folder: a whole model folder with its tokenizer.
        export: bits, and the texts to calibrate with.
        data: how to read them.
    """
    tokenizer = AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    settings = GPTQConfig(
        bits=export.export_quantization_bit,
        tokenizer=tokenizer,
        dataset=_texts(export, data, tokenizer),
        model_seqlen=export.export_quantization_maxlen,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=settings,
        device_map="auto" if torch.cuda.is_available() else "cpu",
        dtype="auto",
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
    )
    quantised = folder / "quantised"
    model.save_pretrained(quantised, max_shard_size=f"{export.export_size}GB")
    for path in (*weight_files(folder), folder / "model.safetensors.index.json"):
        path.unlink(missing_ok=True)
    for path in quantised.iterdir():
        path.replace(folder / path.name)
    shutil.rmtree(quantised)


def _texts(export: ExportArgs, data: DataArgs, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    names = (str(export.export_quantization_dataset),)
    template = load_chat_template(DataArgs(), tokenizer)
    found = [
        _text(row, template)
        for spec in load_dataset_specs(replace(data, dataset=names), names)
        for row in load_conversations(spec, data_args=data, bad_rows=BadRows(data.on_bad_row))
    ]
    return list(islice(found, export.export_quantization_nsamples))


def _text(row: Conversation, template: Template | None) -> str:
    messages: Sequence = row.messages
    if template is None or messages[0].role == "text":
        return "\n".join(message.content for message in messages)
    chat = prepare_chat(messages, template=template, tools=row.tools)
    rendered = chat.render(len(messages), enable_thinking=None, generation_prompt=False)
    return unguarded(rendered.text)
