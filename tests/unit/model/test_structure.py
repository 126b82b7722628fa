"""The structure of a model and its LoRA targets, from a configuration alone."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_config
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
)

from llmtuner.extras.errors import ModelError
from llmtuner.hparams.model import ModelArgs
from llmtuner.model.parameters import trainable_report
from llmtuner.model.structure import ModelStructure, read_structure

_SHAPE = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
_GPT2 = GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=90, bos_token_id=1, eos_token_id=1)


def structure_of(config: PreTrainedConfig, folder: Path, *, rank: int = 8) -> ModelStructure:
    config.save_pretrained(folder)
    return read_structure(ModelArgs(model_name_or_path=str(folder)), lora_rank=rank)


@pytest.mark.parametrize(
    ("config", "targets"),
    [
        (tiny_config(), "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj"),
        (_GPT2, "c_attn c_fc c_proj"),
        (Phi3Config(**_SHAPE), "down_proj gate_up_proj o_proj qkv_proj"),
        (MixtralConfig(**_SHAPE, num_local_experts=4), "k_proj o_proj q_proj v_proj"),
    ],
    ids=["llama", "gpt2", "phi3", "mixtral"],
)
def test_targets_and_counts_are_those_of_peft(config, targets, tmp_path):
    found = structure_of(config, tmp_path, rank=3)
    assert list(found.targets) == targets.split()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        total = trainable_report(model).total
        adapted = get_peft_model(model, LoraConfig(r=3, target_modules=list(found.targets)))
    assert found.parameters == total == sum(kind.parameters for kind in found.kinds)
    assert found.lora_parameters == trainable_report(adapted).trainable
    assert found.layers == config.num_hidden_layers
    roles = {kind.name: kind.role for kind in found.kinds}
    assert roles["lm_head"] == "head"
    assert all(not kind.is_target for kind in found.kinds if kind.role != "linear")


def test_experts_are_said(tmp_path):
    found = structure_of(MixtralConfig(**_SHAPE, num_local_experts=4), tmp_path)
    assert "mixture of experts" in found.notes[0]
    assert {kind.role for kind in found.kinds} == {
        *("embedding", "linear", "experts", "norm", "head", "other")
    }


def test_tied_weights_count_once(tmp_path):
    tied = structure_of(tiny_config(tie_word_embeddings=True), tmp_path / "a")
    apart = structure_of(tiny_config(), tmp_path / "b")
    assert tied.is_tied
    assert apart.parameters - tied.parameters == 320 * 64


def test_foreign_code_is_not_run(tmp_path):
    values = {"model_type": "odd", "auto_map": {"AutoConfig": "odd.Odd"}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "odd.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(ModelError, match="trust_remote_code"):
        read_structure(ModelArgs(model_name_or_path=str(tmp_path)))


def test_what_is_no_language_model_is_one_error(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ModelError, match="No causal language model"):
        read_structure(ModelArgs(model_name_or_path=str(tmp_path)))
