"""Adapters on disk: whole or refused, and tied to the base they were trained on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import make_adapter, save_tiny
from transformers import AutoModelForCausalLM

from llmtuner.extras.errors import ModelError
from llmtuner.hparams.model import ModelArgs
from llmtuner.model.adapter_fit import check_base, check_chain
from llmtuner.model.adapters import locate_adapters, vocabulary_rows, write_base_record
from llmtuner.model.weights import base_digest, read_header, weight_files

ArgsOf = Callable[..., ModelArgs]


@pytest.fixture
def adapter(tiny_model: Path, tmp_path: Path) -> Path:
    return make_adapter(tiny_model, tmp_path / "adapter")


def test_adapters_are_found_below_their_folder(
    adapter: Path, tiny_model: Path, args_of: ArgsOf
) -> None:
    args = args_of(
        tiny_model, adapter_name_or_path=("adapter",), adapter_folder=str(adapter.parent)
    )
    assert locate_adapters(args) == [adapter]
    assert locate_adapters(args_of(tiny_model)) == []


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_missing_file(name: str, adapter: Path, tiny_model: Path, args_of: ArgsOf) -> None:
    (adapter / name).unlink()
    with pytest.raises(ModelError, match=f"has no {name}"):
        locate_adapters(args_of(tiny_model, adapter_name_or_path=(str(adapter),)))


def test_missing_folder(tmp_path: Path, tiny_model: Path, args_of: ArgsOf) -> None:
    args = args_of(tiny_model, adapter_name_or_path=(str(tmp_path / "absent"),))
    with pytest.raises(ModelError, match="no such model folder"):
        locate_adapters(args)


@pytest.mark.parametrize(
    ("text", "message"), [('{"peft_type": "IA3"}', "IA3"), ("[1]", "not a JSON"), ("{", "not a J")]
)
def test_wrong_configuration(
    text: str, message: str, adapter: Path, tiny_model: Path, args_of: ArgsOf
) -> None:
    (adapter / "adapter_config.json").write_text(text)
    with pytest.raises(ModelError, match=message):
        locate_adapters(args_of(tiny_model, adapter_name_or_path=(str(adapter),)))


def test_recorded_base_is_checked(adapter: Path, tiny_model: Path, tmp_path: Path) -> None:
    write_base_record(adapter, tiny_model, name="owner/tiny")
    check_base(adapter, tiny_model)
    sibling = save_tiny(tmp_path / "sibling", seed=3)
    with pytest.raises(ModelError, match=r"another base model.*owner/tiny"):
        check_base(adapter, sibling)


def test_chain_is_checked(adapter: Path, tiny_model: Path, tmp_path: Path) -> None:
    second = make_adapter(tiny_model, tmp_path / "second", seed=2)
    write_base_record(adapter, tiny_model)
    write_base_record(second, tiny_model, merged_adapters=[adapter])
    check_chain([adapter, second], tiny_model)
    for wrong in ([second], [second, adapter]):
        with pytest.raises(ModelError, match="other adapters"):
            check_chain(wrong, tiny_model)


def test_without_record_the_shapes_decide(
    adapter: Path, tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="llmtuner"):
        check_base(adapter, save_tiny(tmp_path / "sibling", seed=3))
    assert "only the shapes were checked" in caplog.text
    wider = save_tiny(tmp_path / "wider", intermediate_size=192)
    with pytest.raises(ModelError, match=r"down_proj is of another size.*Got: 128.*Allowed: 192"):
        check_base(adapter, wider)
    shallow = save_tiny(tmp_path / "shallow", num_hidden_layers=1)
    with pytest.raises(ModelError, match=r"no layer model\.layers\.1"):
        check_base(adapter, shallow)


def test_digest_tells_siblings_apart_but_not_shard_sizes(tiny_model: Path, tmp_path: Path) -> None:
    digest = base_digest(tiny_model)
    assert digest == base_digest(Path(shutil.copytree(tiny_model, tmp_path / "copy")))
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(weight_files(tmp_path / "sharded")) > 1
    assert digest == base_digest(tmp_path / "sharded")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1
    model.save_pretrained(tmp_path / "tuned")
    assert digest != base_digest(tmp_path / "tuned")


@pytest.mark.parametrize("change", [lambda data: data[:-10], lambda data: data + b"x"])
def test_damaged_weights(change: Callable[[bytes], bytes], adapter: Path, tiny_model: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ModelError, match="cut short or damaged"):
        check_base(adapter, tiny_model)


@pytest.mark.parametrize("data", [b"", b"\xff" * 20, b"\x02" + b"\0" * 7 + b"[]"])
def test_not_a_weight_file(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(ModelError, match="damaged"):
        read_header(path)


def test_vocabulary_rows(adapter: Path, tiny_model: Path, tmp_path: Path) -> None:
    assert vocabulary_rows(adapter) == 0
    whole = make_adapter(tiny_model, tmp_path / "whole", modules_to_save=["embed_tokens"])
    assert vocabulary_rows(whole) == 320


def test_record_names_no_place_when_a_name_is_given(adapter: Path, tiny_model: Path) -> None:
    write_base_record(adapter, tiny_model, name="owner/tiny")
    record = json.loads((adapter / "llmtuner_base.json").read_text())
    assert record["base_model"] == "owner/tiny"
    assert len(record["base_digest"]) == 64
