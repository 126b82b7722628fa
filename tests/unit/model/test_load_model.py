"""Loading the base model: what works, and one clear line for everything that does not."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, MixtralConfig

from llmtuner.extras.errors import ConfigError, MissingExtraError, ModelError
from llmtuner.hparams.model import ModelArgs
from llmtuner.model import quantize
from llmtuner.model.load import embedding_rows, load_config, load_model
from llmtuner.model.parameters import trainable_report

ArgsOf = Callable[..., ModelArgs]


def load(args: ModelArgs, **changes: object):
    values = {"dtype": torch.float32, "attention": "sdpa"} | changes
    return load_model(args, **values)


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "copy"))


def test_dtype_and_name(tiny_model: Path, args_of: ArgsOf) -> None:
    model = load(args_of(tiny_model), dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config._name_or_path == str(tiny_model)


def test_random_start_differs_from_the_weights(tiny_model: Path, args_of: ArgsOf) -> None:
    model = load(args_of(tiny_model))
    fresh = load(args_of(tiny_model, train_from_scratch=True))
    assert not torch.equal(model.lm_head.weight, fresh.lm_head.weight)


def test_pickled_weights_are_refused(copy: Path, args_of: ArgsOf) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled"):
        load(args_of(copy))


def test_missing_shard_is_named(copy: Path, args_of: ArgsOf) -> None:
    (copy / "model.safetensors").rename(copy / "model-00001-of-00002.safetensors")
    index = {
        "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002.safetensors"}
    }
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"missing.*model-00002\.safetensors"):
        load(args_of(copy))


def test_cut_weight_file(copy: Path, args_of: ArgsOf) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        load(args_of(copy))
    assert "\n" not in str(caught.value)


def test_absent_weights_are_not_made_up(copy: Path, args_of: ArgsOf) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ModelError, match=r"lack some of its weights.*layers\.2"):
        load(args_of(copy))


def test_broken_config(copy: Path, args_of: ArgsOf) -> None:
    (copy / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(args_of(copy))


def test_foreign_code_does_not_run(copy: Path, args_of: ArgsOf) -> None:
    (copy / "modeling_x.py").write_text("import sys; sys.modules['llmtuner_canary'] = sys\n")
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "x", "auto_map": {"AutoConfig": "modeling_x.X"}}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="--trust_remote_code"):
        load(args_of(copy))
    assert "llmtuner_canary" not in sys.modules


def test_config_cannot_name_a_kernel(copy: Path, args_of: ArgsOf) -> None:
    config = json.loads((copy / "config.json").read_text())
    config |= {"_attn_implementation_internal": "evil/kernel", "attn_implementation": "evil/kernel"}
    (copy / "config.json").write_text(json.dumps(config))
    assert load(args_of(copy)).config._attn_implementation == "sdpa"


def test_vocabulary_grows_around_the_mean(tiny_model: Path, args_of: ArgsOf) -> None:
    model = load(args_of(tiny_model, resize_vocab=True), num_tokens=321)
    assert embedding_rows(model) == 384
    assert model.config.vocab_size == 384
    old, new = model.lm_head.weight[:320], model.lm_head.weight[320:]
    assert (new.mean(0) - old.mean(0)).abs().max() < old.std()
    assert new.std() > 0


def test_growing_keeps_the_head_tied(tied_model: Path, args_of: ArgsOf) -> None:
    model = load(args_of(tied_model, add_tokens=("a",)), num_tokens=321)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_vocabulary_does_not_grow_unasked(tiny_model: Path, args_of: ArgsOf) -> None:
    assert embedding_rows(load(args_of(tiny_model, resize_vocab=True), num_tokens=300)) == 320
    with pytest.raises(ModelError, match="--resize_vocab"):
        load(args_of(tiny_model), num_tokens=321)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3"])
def test_rope_scaling_runs(kind: str, tiny_model: Path, args_of: ArgsOf) -> None:
    args = args_of(tiny_model, rope_scaling=kind)
    model = load(args, max_tokens=200)
    assert model.config.rope_parameters["rope_type"] == kind
    assert model.config.rope_parameters["factor"] == 2.0
    ids = torch.randint(3, 300, (1, 200))
    logits = model(input_ids=ids).logits
    assert logits.isfinite().all()
    assert not torch.allclose(logits, load(args_of(tiny_model))(input_ids=ids).logits, atol=1e-4)


def test_rope_is_left_alone_when_texts_fit(tiny_model: Path, args_of: ArgsOf) -> None:
    config = load_config(args_of(tiny_model, rope_scaling="linear"), max_tokens=128)
    assert config.rope_parameters["rope_type"] == "default"


def test_rope_scaling_needs_rope(tmp_path: Path, args_of: ArgsOf) -> None:
    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="rope_scaling"):
        load_config(args_of(tmp_path, rope_scaling="linear"))


def test_expert_balance(tmp_path: Path, tiny_model: Path, args_of: ArgsOf) -> None:
    MixtralConfig().save_pretrained(tmp_path)
    config = load_config(args_of(tmp_path, moe_aux_loss_coef=0.5))
    assert config.router_aux_loss_coef == 0.5
    assert config.output_router_logits
    with pytest.raises(ConfigError, match="no experts"):
        load_config(args_of(tiny_model, moe_aux_loss_coef=0.5))


def test_upcasts(tiny_model: Path, args_of: ArgsOf) -> None:
    args = args_of(tiny_model, upcast_layernorm=True, upcast_lmhead_output=True)
    model = load(args, dtype=torch.bfloat16)
    assert model.model.norm.weight.dtype == torch.float32
    assert model.lm_head.weight.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(input_ids=torch.tensor([[5, 6]])).logits.dtype == torch.float32


@pytest.mark.parametrize(
    ("bits", "kind", "error"), [(4, "nf4", 0.15), (4, "fp4", 0.25), (8, "", 0.02)]
)
def test_quantised_layers_are_close(
    bits: int, kind: str, error: float, tiny_model: Path, args_of: ArgsOf
) -> None:
    pytest.importorskip("bitsandbytes")
    plain = load(args_of(tiny_model))
    args = args_of(tiny_model, quantization_bit=bits, quantization_type=kind or "nf4")
    packed = load(args).eval()
    layer = packed.model.layers[0].mlp.up_proj
    assert type(layer).__name__ == ("Linear4bit" if bits == 4 else "Linear8bitLt")
    assert trainable_report(packed).total == trainable_report(plain).total
    vectors = torch.randn(1, 20, 64)
    with torch.no_grad():
        left, right = plain.model.layers[0].mlp.up_proj(vectors), layer(vectors)
        assert 0 < (left - right).norm() / left.norm() < error
        assert packed(input_ids=torch.tensor([[5, 6, 7]])).logits.isfinite().all()


def test_evaluation_leaves_quantised_weights_trainable(tiny_model: Path, args_of: ArgsOf) -> None:
    pytest.importorskip("bitsandbytes")
    model = load(args_of(tiny_model, quantization_bit=4), dtype=torch.bfloat16)
    vectors = torch.randn(1, 5, 64, dtype=torch.bfloat16, requires_grad=True)

    def gradient() -> torch.Tensor:
        model.train()
        (result,) = torch.autograd.grad(model(inputs_embeds=vectors).logits.sum(), vectors)
        return result

    before = gradient()
    model.eval()
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7]]))
    assert torch.equal(gradient(), before)


def test_missing_bitsandbytes_names_the_extra(
    tiny_model: Path, args_of: ArgsOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="bitsandbytes"):
        load(args_of(tiny_model, quantization_bit=4))
