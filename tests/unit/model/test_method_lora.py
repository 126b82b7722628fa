"""LoRA: where adapters sit, what learns, how earlier adapters are taken up."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tiny_models import BF16, FP32, make_adapter, random_lora, save_tiny

from llmtuner.extras.errors import ConfigError, ModelError
from llmtuner.hparams.lora import LoraArgs
from llmtuner.hparams.model import ModelArgs
from llmtuner.model import quantize
from llmtuner.model.adapters import write_base_record
from llmtuner.model.methods import lora
from llmtuner.model.methods.lora import load_for_training, split_adapters
from llmtuner.model.parameters import trainable_report
from llmtuner.model.precision import Precision
from llmtuner.model.tokenizer import load_tokenizer

ArgsOf = Callable[..., ModelArgs]
ALL_LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def load(args: ModelArgs, *, precision: Precision = FP32, **options: object) -> PeftModel:
    return load_for_training(
        args,
        LoraArgs(**options),
        precision=precision,
        attention="sdpa",
        tokenizer=load_tokenizer(args),
    )


def learning(model: torch.nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_all_means_every_linear_layer_but_the_head(tiny_model: Path, args_of: ArgsOf) -> None:
    model = load(args_of(tiny_model))
    config = model.peft_config["default"]
    assert set(config.target_modules) == ALL_LINEAR
    assert (config.r, config.lora_alpha) == (8, 16)
    assert all("lora_" in name for name in learning(model))
    report = trainable_report(model)
    assert report.trainable == 2 * 8 * (4 * 64 + 2 * (64 + 32) + 3 * (64 + 128))
    assert 0 < report.percent < 100


def test_named_targets_and_options(tiny_model: Path, args_of: ArgsOf) -> None:
    model = load(
        args_of(tiny_model),
        lora_target=("q_proj", "lm_head"),
        lora_rank=4,
        lora_alpha=5,
        use_rslora=True,
        use_dora=True,
        lora_dropout=0.5,
    )
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.use_rslora, config.use_dora) == (4, 5, True, True)
    layers = {name.split(".lora_")[0].rpartition(".")[2] for name in learning(model)}
    assert layers == {"q_proj", "lm_head"}


def test_unknown_target_lists_the_known(tiny_model: Path, args_of: ArgsOf) -> None:
    with pytest.raises(ConfigError, match=r"q_porj.*Allowed: all, down_proj"):
        load(args_of(tiny_model), lora_target=("q_porj",))
    with pytest.raises(ConfigError, match="additional_target"):
        load(args_of(tiny_model), additional_target=("embeddings",))


@pytest.mark.parametrize(
    ("precision", "trained"),
    [(BF16, torch.float32), (Precision("bf16", pure=True, reason=""), torch.bfloat16)],
)
def test_types(
    precision: Precision, trained: torch.dtype, tiny_model: Path, args_of: ArgsOf
) -> None:
    model = load(args_of(tiny_model), precision=precision, additional_target=("norm",))
    kinds = {p.requires_grad: p.dtype for p in model.parameters()}
    assert kinds == {True: trained, False: torch.bfloat16}
    with precision.autocast("cpu"):
        model(input_ids=torch.tensor([[5, 6]])).logits.sum().backward()


def test_grown_vocabulary_learns_its_new_rows(tiny_model: Path, args_of: ArgsOf) -> None:
    words = tuple(f"herb{index}" for index in range(70))
    model = load(args_of(tiny_model, add_tokens=words))
    assert set(model.peft_config["default"].modules_to_save) == {"embed_tokens", "lm_head"}
    assert model.get_base_model().config.vocab_size == 384


def test_tied_head_stays_tied_while_it_learns(tied_model: Path, args_of: ArgsOf) -> None:
    model = load(args_of(tied_model), additional_target=("embed_tokens",))
    base = model.get_base_model()
    embedding = base.get_input_embeddings().modules_to_save["default"]
    head = base.get_output_embeddings().modules_to_save["default"]
    assert embedding.weight is head.weight
    assert embedding.weight.requires_grad


def test_one_adapter_is_trained_further(tiny_model: Path, tmp_path: Path, args_of: ArgsOf) -> None:
    folder = make_adapter(tiny_model, tmp_path / "a", rank=2)
    args = args_of(tiny_model, adapter_name_or_path=(str(folder),))
    model = load(args, lora_rank=8)
    assert model.peft_config["default"].r == 2
    assert learning(model)
    other = PeftModel.from_pretrained(load(args_of(tiny_model)).unload(), folder)
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(model(input_ids=ids).logits, other(input_ids=ids).logits)


@pytest.mark.parametrize(("create", "num_merged"), [(False, 1), (True, 2)])
def test_several_adapters(
    create: bool, num_merged: int, tiny_model: Path, tmp_path: Path, args_of: ArgsOf
) -> None:
    folders = [make_adapter(tiny_model, tmp_path / str(i), seed=i) for i in (1, 2)]
    args = args_of(tiny_model, adapter_name_or_path=tuple(map(str, folders)))
    options = LoraArgs(create_new_adapter=create)
    merged, resumed = split_adapters(args, options)
    assert merged == folders[:num_merged]
    assert resumed == (None if create else folders[1])

    model = load(args, create_new_adapter=create)
    expected = load(args_of(tiny_model)).unload()
    for folder in folders:
        expected = PeftModel.from_pretrained(expected, folder).merge_and_unload()
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(
        model(input_ids=ids).logits, expected(input_ids=ids).logits, rtol=0, atol=1e-4
    )


def test_adapter_of_another_base_is_refused(
    tiny_model: Path, tmp_path: Path, args_of: ArgsOf
) -> None:
    sibling = save_tiny(tmp_path / "sibling", seed=5)
    folder = make_adapter(tiny_model, tmp_path / "a")
    write_base_record(folder, tiny_model)
    args = args_of(sibling, adapter_name_or_path=(str(folder),))
    with pytest.raises(ModelError, match="another base model") as caught:
        load(args)
    assert caught.value.exit_code == 4


def test_quantised_base_learns(tiny_model: Path, args_of: ArgsOf) -> None:
    pytest.importorskip("bitsandbytes")
    model = load(args_of(tiny_model, quantization_bit=4), precision=BF16)
    assert set(model.peft_config["default"].target_modules) == ALL_LINEAR
    random_lora(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    ids = torch.randint(3, 300, (1, 30))
    losses = []
    for _ in range(5):
        with BF16.autocast("cpu"):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)


def test_zero3_refuses_what_it_would_break(
    tiny_model: Path, tmp_path: Path, args_of: ArgsOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(make_adapter(tiny_model, tmp_path / "a"))
    monkeypatch.setattr(lora, "is_deepspeed_zero3_enabled", lambda: True)
    monkeypatch.setattr(quantize, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ConfigError, match="ZeRO-3 has spread"):
        load(args_of(tiny_model, adapter_name_or_path=(folder, folder)))
    with pytest.raises(ConfigError, match="use ZeRO-2"):
        load(args_of(tiny_model, quantization_bit=4))


def test_refused_combinations(tiny_model: Path, tmp_path: Path, args_of: ArgsOf) -> None:
    folder = str(make_adapter(tiny_model, tmp_path / "a"))
    quantised = args_of(tiny_model, quantization_bit=4, adapter_name_or_path=(folder, folder))
    with pytest.raises(ConfigError, match="merged into a quantised base"):
        load(quantised)
