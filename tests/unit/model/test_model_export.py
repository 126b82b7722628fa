"""Export: the merged model is the base with its adapters, whole, in plain format."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from tiny_models import FP32, make_adapter, random_lora, save_tiny
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from llmtuner.extras.errors import ConfigError, ModelError, StorageError
from llmtuner.hparams.export import ExportArgs
from llmtuner.hparams.lora import LoraArgs
from llmtuner.hparams.model import ModelArgs
from llmtuner.model import export as module
from llmtuner.model.adapters import write_base_record
from llmtuner.model.export import ExportReport, export_model
from llmtuner.model.methods.lora import load_for_training
from llmtuner.model.tokenizer import load_tokenizer

ArgsOf = Callable[..., ModelArgs]
IDS = torch.tensor([[5, 60, 7, 200, 31]])


def export(args: ModelArgs, target: Path, **more: object) -> ExportReport:
    return export_model(args, ExportArgs(export_dir=str(target)), **more)


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def with_adapters(base: Path, *adapters: Path) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(base)
    for adapter in adapters[:-1]:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return PeftModel.from_pretrained(model, adapters[-1])


def greedy(model: torch.nn.Module) -> list[int]:
    mask = torch.ones_like(IDS)
    return model.generate(input_ids=IDS, attention_mask=mask, max_new_tokens=8, do_sample=False)[
        0
    ].tolist()


@pytest.mark.parametrize("more", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_merged_equals_base_and_adapter(
    more: dict, tiny_model: Path, tmp_path: Path, args_of: ArgsOf
) -> None:
    adapter = make_adapter(tiny_model, tmp_path / "adapter", **more)
    report = export(args_of(tiny_model, adapter_name_or_path=(str(adapter),)), tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    beside = with_adapters(tiny_model, adapter)
    assert (logits(merged) - logits(beside)).abs().max() < 1e-4
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert (logits(merged) - logits(base)).abs().max() > 1e-2
    assert greedy(merged) == greedy(beside)
    assert report.merged_adapters == (adapter,)
    assert (report.dtype, report.num_files) == ("float32", 1)
    assert report.num_parameters == sum(p.numel() for p in base.parameters())


def test_adapters_merge_in_order(tiny_model: Path, tmp_path: Path, args_of: ArgsOf) -> None:
    folders = [make_adapter(tiny_model, tmp_path / str(seed), seed=seed) for seed in (1, 2)]
    export(args_of(tiny_model, adapter_name_or_path=tuple(map(str, folders))), tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (logits(merged) - logits(with_adapters(tiny_model, *folders))).abs().max() < 1e-4


def test_half_precision_is_rounded_once(tmp_path: Path, args_of: ArgsOf) -> None:
    base = save_tiny(tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    folders = [make_adapter(base, tmp_path / str(seed), seed=seed) for seed in (1, 2)]
    report = export(args_of(base, adapter_name_or_path=tuple(map(str, folders))), tmp_path / "out")
    assert report.dtype == "bfloat16"
    exact = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for folder in folders:
        exact = PeftModel.from_pretrained(exact, folder).merge_and_unload()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for (name, left), right in zip(merged.named_parameters(), exact.parameters(), strict=True):
        assert torch.equal(left, right.to(torch.bfloat16)), name


def test_tied_weights_stay_tied(tied_model: Path, tmp_path: Path, args_of: ArgsOf) -> None:
    args = args_of(tied_model)
    model = load_for_training(
        args,
        LoraArgs(additional_target=("embed_tokens",)),
        precision=FP32,
        attention="sdpa",
        tokenizer=load_tokenizer(args),
    )
    random_lora(model)
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model)
    export(args_of(tied_model, adapter_name_or_path=(str(tmp_path / "adapter"),)), tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert (logits(merged) - expected).abs().max() < 1e-4
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 - safe_open is not iterable


@pytest.mark.parametrize("tied", [False, True])
def test_added_tokens_come_along(tied: bool, tmp_path: Path, args_of: ArgsOf) -> None:
    base = save_tiny(tmp_path / "base", tie_word_embeddings=tied)
    args = args_of(base, add_special_tokens=tuple(f"<|{i}|>" for i in range(70)))
    tokenizer = load_tokenizer(args)
    model = load_for_training(
        args, LoraArgs(), precision=FP32, attention="sdpa", tokenizer=tokenizer
    )
    random_lora(model)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    # The export need not know which tokens were added: they come with the adapter.
    export(args_of(base, adapter_name_or_path=(str(tmp_path / "adapter"),)), tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    saved = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (logits(merged) - expected).abs().max() < 1e-4
    assert len(saved) == len(tokenizer) <= merged.config.vocab_size
    assert saved("<|69|>").input_ids == tokenizer("<|69|>").input_ids


def test_text_files(tiny_model: Path, tmp_path: Path, args_of: ArgsOf) -> None:
    adapter = make_adapter(tiny_model, tmp_path / "adapter")
    GenerationConfig(eos_token_id=[2, 7]).save_pretrained(adapter)
    args = args_of(tiny_model, adapter_name_or_path=(str(adapter),))
    export(args, tmp_path / "out", template_text="{{ messages[0]['content'] }}!")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "tokenizer.json", "chat_template.jinja"} <= names
    assert not {"training_args.bin", "adapter_config.json"} & names
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    message = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(message, tokenize=False) == "hi!"
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [2, 7]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert "_name_or_path" not in config
    assert not any("attn_impl" in name for name in config)


def test_model_without_adapters_and_another_type(
    tiny_model: Path, tmp_path: Path, args_of: ArgsOf
) -> None:
    args = args_of(tiny_model, infer_dtype="bfloat16")
    assert export(args, tmp_path / "out").dtype == "bfloat16"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_empty_folder_may_exist_a_used_one_not(
    tiny_model: Path, tmp_path: Path, args_of: ArgsOf
) -> None:
    (tmp_path / "out").mkdir()
    export(args_of(tiny_model), tmp_path / "out")
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    with pytest.raises(ConfigError, match="not empty"):
        export(args_of(tiny_model), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before


def test_a_failure_leaves_nothing(
    tiny_model: Path, tmp_path: Path, args_of: ArgsOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "sync_tree", full_disk)
    with pytest.raises(StorageError, match="No space left") as caught:
        export(args_of(tiny_model), tmp_path / "out")
    assert caught.value.exit_code == 6
    assert list(tmp_path.iterdir()) == []


def test_too_small_disk(
    tiny_model: Path, tmp_path: Path, args_of: ArgsOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 10)
    )
    with pytest.raises(StorageError, match="too small"):
        export(args_of(tiny_model), tmp_path / "out")


def test_wrong_base_is_refused(tiny_model: Path, tmp_path: Path, args_of: ArgsOf) -> None:
    adapter = make_adapter(tiny_model, tmp_path / "adapter")
    write_base_record(adapter, tiny_model)
    sibling = save_tiny(tmp_path / "sibling", seed=9)
    with pytest.raises(ModelError, match="another base") as caught:
        export(args_of(sibling, adapter_name_or_path=(str(adapter),)), tmp_path / "out")
    assert caught.value.exit_code == 4
    assert not (tmp_path / "out").exists()


def test_adapter_with_nan_is_refused(tiny_model: Path, tmp_path: Path, args_of: ArgsOf) -> None:
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model),
        make_adapter(tiny_model, tmp_path / "adapter"),
    )
    next(p for name, p in model.named_parameters() if "lora_A" in name).data[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "adapter")
    args = args_of(tiny_model, adapter_name_or_path=(str(tmp_path / "adapter"),))
    with pytest.raises(ModelError, match="cannot be merged"):
        export(args, tmp_path / "out")


def test_refused_options(tiny_model: Path, tmp_path: Path, args_of: ArgsOf) -> None:
    with pytest.raises(ConfigError, match="quantised"):
        export(args_of(tiny_model, quantization_bit=4), tmp_path / "out")
    with pytest.raises(ConfigError, match="--export_dir"):
        export_model(args_of(tiny_model), ExportArgs())
