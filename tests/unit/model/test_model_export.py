"""Export: the merged model is the base with its adapters, whole, in plain format."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import FP32, make_adapter, random_lora, save_tiny, tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GPT2Config

from llmtuner.extras.errors import ConfigError, ModelError
from llmtuner.hparams.export import ExportArgs
from llmtuner.hparams.lora import LoraArgs
from llmtuner.hparams.model import ModelArgs
from llmtuner.model.export import ExportReport, ExportTexts, export_model
from llmtuner.model.methods.lora import load_for_training
from llmtuner.model.streaming import tensors as blocks
from llmtuner.model.streaming.base_files import read_base
from llmtuner.model.streaming.plan import plan_merge
from llmtuner.model.streaming.shards import OutputTensor, write_shards
from llmtuner.model.tokenizer import load_tokenizer

ArgsOf = Callable[..., ModelArgs]
IDS = torch.tensor([[5, 60, 7, 200, 31]])


def export(args: ModelArgs, target: Path, **options: object) -> ExportReport:
    texts = options.pop("texts", None)
    return export_model(args, ExportArgs(export_dir=str(target), **options), texts=texts)


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def with_adapters(base: Path, *adapters: Path) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(base)
    for adapter in adapters[:-1]:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return PeftModel.from_pretrained(model, adapters[-1])


def merged_logits(args_of: ArgsOf, base: Path, out: Path, *adapters: Path) -> Tensor:
    export(args_of(base, adapter_name_or_path=tuple(map(str, adapters))), out)
    return logits(AutoModelForCausalLM.from_pretrained(out))


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def gpt2(folder: Path) -> Path:
    """A model of Conv1D layers, saved as the first one was: names without their prefix."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=64, n_layer=2, n_head=2, vocab_size=320, n_positions=64, initializer_range=0.2
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    short = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    save_file(short, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


LORA_KINDS = {
    "plain": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 6},
        "alpha_pattern": {r"0\.self_attn\.q_proj": 32},
    },
    "some layers": {"layers_to_transform": [1]},
    "whole modules": {"modules_to_save": ["lm_head", "norm"]},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
    "dora embedding": {"target_modules": ["embed_tokens"], "use_dora": True},
    "head": {"target_modules": ["lm_head", "o_proj"]},
}  # fmt: skip


@pytest.mark.parametrize("more", LORA_KINDS.values(), ids=LORA_KINDS)
def test_merged_equals_base_and_adapter(
    more: dict, tiny_model: Path, tmp_path: Path, args_of: ArgsOf
) -> None:
    adapter = make_adapter(tiny_model, tmp_path / "adapter", **more)
    merged = merged_logits(args_of, tiny_model, tmp_path / "out", adapter)
    assert (merged - logits(with_adapters(tiny_model, adapter))).abs().max() < 1e-4
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert (merged - logits(base)).abs().max() > 1e-2


@pytest.mark.parametrize("more", [{}, {"use_dora": True}, {"fan_in_fan_out": True}])
def test_gpt2(more: dict, tmp_path: Path, args_of: ArgsOf) -> None:
    base = gpt2(tmp_path / "base")
    adapter = make_adapter(
        base, tmp_path / "adapter", target_modules=["c_attn", "c_proj", "c_fc"], **more
    )
    merged = merged_logits(args_of, base, tmp_path / "out", adapter)
    assert (merged - logits(with_adapters(base, adapter))).abs().max() < 1e-4
    assert "h.0.attn.c_attn.weight" in load_file(tmp_path / "out" / "model.safetensors")


def test_bias_of_lora_and_of_the_base(tmp_path: Path, args_of: ArgsOf) -> None:
    base = save_tiny(tmp_path / "base", attention_bias=True)
    for more in ({"lora_bias": True}, {"bias": "all"}, {"bias": "lora_only"}):
        name = "-".join(map(str, (*more, *more.values())))
        adapter = make_adapter(base, tmp_path / name, target_modules=["q_proj"], **more)
        path = adapter / "adapter_model.safetensors"
        weights = {
            key: tensor + 0.5 if key.endswith("bias") else tensor
            for key, tensor in load_file(path).items()
        }
        save_file(weights, path)
        merged = merged_logits(args_of, base, tmp_path / f"{name}-out", adapter)
        assert (merged - logits(with_adapters(base, adapter))).abs().max() < 1e-4


def test_adapters_merge_in_order(tiny_model: Path, tmp_path: Path, args_of: ArgsOf) -> None:
    kinds = ({}, {"use_dora": True}, {"use_dora": True, "target_modules": ["embed_tokens"]})
    folders = [
        make_adapter(tiny_model, tmp_path / str(seed), seed=seed, **more)
        for seed, more in enumerate(kinds)
    ]
    merged = merged_logits(args_of, tiny_model, tmp_path / "out", *folders)
    assert (merged - logits(with_adapters(tiny_model, *folders))).abs().max() < 1e-4


def test_blocks_of_rows_change_nothing(
    tiny_model: Path, tmp_path: Path, args_of: ArgsOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = {"use_dora": True, "target_modules": ["embed_tokens", "q_proj", "down_proj"]}
    adapter = make_adapter(tiny_model, tmp_path / "adapter", **kinds)
    whole = merged_logits(args_of, tiny_model, tmp_path / "whole", adapter)
    monkeypatch.setattr(blocks, "BLOCK_NUMBERS", 200)
    parts = merged_logits(args_of, tiny_model, tmp_path / "parts", adapter)
    assert (whole - parts).abs().max() < 1e-5


def test_half_precision_is_rounded_once(tmp_path: Path, args_of: ArgsOf) -> None:
    base = save_tiny(tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    folders = [make_adapter(base, tmp_path / str(seed), seed=seed) for seed in (1, 2)]
    report = export(args_of(base, adapter_name_or_path=tuple(map(str, folders))), tmp_path / "out")
    assert report.dtype == "bfloat16"
    exact = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    for folder in folders:
        exact = PeftModel.from_pretrained(exact, folder).merge_and_unload()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    differ = total = 0
    for left, right in zip(merged.parameters(), exact.parameters(), strict=True):
        differ += (left != right.to(torch.bfloat16)).sum().item()
        total += left.numel()
    # A float32 sum may fall on the other side of a tie, once in some 10,000 numbers; rounding twice
    # differs in one of five.
    assert differ <= total / 2000


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_types(dtype: str, tiny_model: Path, tmp_path: Path, args_of: ArgsOf) -> None:
    assert export(args_of(tiny_model), tmp_path / "out", export_dtype=dtype).dtype == dtype
    export(args_of(tiny_model, infer_dtype=dtype), tmp_path / "same")
    wanted = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=dtype)
    for folder in (tmp_path / "out", tmp_path / "same"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        for one, other in zip(model.parameters(), wanted.parameters(), strict=True):
            assert torch.equal(one, other)
            assert one.dtype == other.dtype


def test_weights_kept_in_another_type_keep_it(tmp_path: Path, args_of: ArgsOf) -> None:
    base = save_tiny(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    half = {n: t if "norm" in n else t.to(torch.bfloat16) for n, t in weights.items()}
    save_file(half, base / "model.safetensors", metadata={"format": "pt"})
    export(args_of(base), tmp_path / "out", export_dtype="float16")
    found = load_file(tmp_path / "out" / "model.safetensors")
    kinds = {name: tensor.dtype for name, tensor in found.items()}
    assert {kind for name, kind in kinds.items() if "norm" in name} == {torch.float32}
    assert {kind for name, kind in kinds.items() if "norm" not in name} == {torch.float16}


TIED_KINDS = {
    "lora beside": {"target_modules": ["q_proj"]},
    "whole embedding": {"modules_to_save": ["embed_tokens"]},
    "whole head": {"modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
}


@pytest.mark.parametrize("rows", [320, 384])
@pytest.mark.parametrize("ensured", [True, False])
@pytest.mark.parametrize("more", TIED_KINDS.values(), ids=TIED_KINDS)
def test_tied_weights(
    more: dict, ensured: bool, rows: int, tied_model: Path, tmp_path: Path, args_of: ArgsOf
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tied_model)
    adapter = make_adapter(
        tied_model, tmp_path / "adapter", rows=rows, ensure_weight_tying=ensured, **more
    )
    merged = merged_logits(args_of, tied_model, tmp_path / "out", adapter)
    model.resize_token_embeddings(rows)
    beside = PeftModel.from_pretrained(model, adapter)
    assert (merged - logits(beside)).abs().max() < 1e-4
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    is_one = found.lm_head.weight is found.model.embed_tokens.weight
    assert is_one == (ensured or more == TIED_KINDS["lora beside"])
    assert found.config.vocab_size == rows
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) != is_one  # noqa: SIM118 - not iterable


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
    adapter = tmp_path / "adapter"
    model.save_pretrained(adapter)
    with pytest.raises(ModelError, match="after they were trained"):
        export(args, tmp_path / "out")
    with pytest.raises(ModelError, match="after they were trained"):
        export(
            args_of(base, add_tokens=("new",), adapter_name_or_path=(str(adapter),)),
            tmp_path / "out",
        )
    tokenizer.save_pretrained(adapter)
    # The export need not know which tokens were added: they come with the adapter.
    merged = merged_logits(args_of, base, tmp_path / "out", adapter)
    saved = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (merged - expected).abs().max() < 1e-4
    assert len(saved) == len(tokenizer)
    assert saved("<|69|>").input_ids == tokenizer("<|69|>").input_ids


def test_text_files(tiny_model: Path, tmp_path: Path, args_of: ArgsOf) -> None:
    adapter = make_adapter(tiny_model, tmp_path / "adapter")
    GenerationConfig(eos_token_id=[2, 7]).save_pretrained(adapter)
    args = args_of(tiny_model, adapter_name_or_path=(str(adapter),))
    export(args, tmp_path / "plain")
    texts = ExportTexts("{{ messages[0]['content'] }}!", [5])
    export(args, tmp_path / "out", texts=texts)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "tokenizer.json", "chat_template.jinja"} <= names
    assert not {"training_args.bin", "adapter_config.json"} & names
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "plain" / name).read_bytes() == (tiny_model / name).read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    message = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(message, tokenize=False) == "hi!"
    assert GenerationConfig.from_pretrained(tmp_path / "plain").eos_token_id == [2, 7]
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [5]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert "_name_or_path" not in config


def test_shards(tmp_path: Path, args_of: ArgsOf) -> None:
    base = save_tiny(tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(base, max_shard_size="100KB")
    adapter = make_adapter(base, tmp_path / "adapter")
    plan = plan_merge(read_base(base), [adapter])
    outputs = [OutputTensor(tensor, "F32") for tensor in plan.tensors]
    out = tmp_path / "out"
    shutil.copytree(base, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    files = write_shards(out, outputs, shard_bytes=100_000)
    assert len(files) > 2
    assert max(path.stat().st_size for path in files) < 104_000
    merged = logits(AutoModelForCausalLM.from_pretrained(out))
    assert (merged - logits(with_adapters(base, adapter))).abs().max() < 1e-4
    export(args_of(out), tmp_path / "joined")
    assert logits(AutoModelForCausalLM.from_pretrained(tmp_path / "joined")).equal(merged)
    index = out / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    for file in ("absent.safetensors", "../base/model.safetensors", files[0].name):
        index.write_text(json.dumps({"weight_map": weight_map | {"lost": file}}))
        with pytest.raises(ModelError, match=r"lack some|missing|damaged"):
            export(args_of(out), tmp_path / "again")


def test_empty_folder_may_exist_a_used_one_not(
    tiny_model: Path, tmp_path: Path, args_of: ArgsOf
) -> None:
    (tmp_path / "out").mkdir()
    export(args_of(tiny_model), tmp_path / "out")
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    with pytest.raises(ConfigError, match="not empty"):
        export(args_of(tiny_model), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before
