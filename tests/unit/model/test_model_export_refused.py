"""Exports that are refused, interrupted or out of room: one message, and nothing is left behind."""

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_adapter, save_tiny

from llmtuner.extras.errors import ConfigError, ModelError, StorageError
from llmtuner.hparams.export import ExportArgs
from llmtuner.hparams.model import ModelArgs
from llmtuner.model.adapters import write_base_record
from llmtuner.model.export import export_model

ArgsOf = Callable[..., ModelArgs]
SOURCE = Path(__file__).parents[3] / "src"


@pytest.fixture
def adapter(tiny_model: Path, tmp_path: Path) -> Path:
    return make_adapter(tiny_model, tmp_path / "adapter")


def refused(
    match: str, base: Path, *adapters: Path, args: ArgsOf, code: int = 4, **options: object
) -> None:
    target = adapters[0].parent / "out" if adapters else base.parent / "out"
    model = args(base, adapter_name_or_path=tuple(map(str, adapters)) or None)
    with pytest.raises((ModelError, ConfigError), match=match) as caught:
        export_model(model, ExportArgs(export_dir=str(target), **options))
    assert caught.value.exit_code == code
    assert not list(target.parent.glob("*out*"))


def edit_config(adapter: Path, **changes: object) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(adapter: Path, change: Callable[[dict], object]) -> None:
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("target_parameters", ["mlp.experts.down_proj"]),
        ("trainable_token_indices", [1]),
        ("layer_replication", [[0, 2]]),
        ("alora_invocation_tokens", [1, 2]),
        ("init_lora_weights", "pissa"),
        ("use_qalora", True),
        ("something_of_tomorrow", {"a": 1}),
        ("rank_pattern", {"(": 3}),
        ("r", 0),
        ("r", 3),
        ("lora_alpha", None),
        ("use_dora", True),
        ("lora_bias", True),
    ],
)
def test_setting(
    name: str, value: object, adapter: Path, tiny_model: Path, args_of: ArgsOf
) -> None:
    edit_config(adapter, **{name: value})
    known = name not in ("rank_pattern", "r", "lora_alpha", "use_dora", "lora_bias")
    refused(name if known else "damaged|rank|fit", tiny_model, adapter, args=args_of)


Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj."


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda w: w.update({f"{Q_PROJ}lora_X.weight": torch.ones(2)}), "place in the model"),
        (lambda w: w.update({"lora_A.weight": torch.ones(2)}), "place in the model"),
        (lambda w: w.update({f"{Q_PROJ}weight": torch.ones(64, 64)}), "account for"),
        (lambda w: w.pop(f"{Q_PROJ}lora_A.weight"), "q_proj do not fit"),
        (lambda w: w.update({f"{Q_PROJ}lora_A.weight": torch.ones(4, 65)}), "another size"),
        (lambda w: w.update({f"{Q_PROJ}lora_B.weight": torch.ones(0, 4)}), "another size"),
        (
            lambda w: w[f"{Q_PROJ}lora_A.weight"].fill_(torch.nan),
            r"finite, in model\.layers\.0",
        ),
        (lambda w: w[f"{Q_PROJ}lora_A.weight"].fill_(3e38), "not finite"),
    ],
)
def test_tensor(
    change: Callable, match: str, adapter: Path, tiny_model: Path, args_of: ArgsOf
) -> None:
    edit_weights(adapter, change)
    refused(match, tiny_model, adapter, args=args_of)


def test_two_tensors_for_one_place(adapter: Path, tiny_model: Path, args_of: ArgsOf) -> None:
    edit_config(adapter, modules_to_save=["norm"])
    names = [f"base_model.model.{start}model.norm.weight" for start in ("", "x.")]
    edit_weights(adapter, lambda w: w.update({name: torch.ones(64) for name in names}))
    refused("no place of their own", tiny_model, adapter, args=args_of)


def test_module_that_the_base_has_not(
    adapter: Path, tiny_model: Path, tmp_path: Path, args_of: ArgsOf
) -> None:
    shallow = save_tiny(tmp_path / "shallow", num_hidden_layers=1)
    refused(r"no model\.layers\.1\.", shallow, adapter, args=args_of)


def test_another_base(adapter: Path, tiny_model: Path, tmp_path: Path, args_of: ArgsOf) -> None:
    write_base_record(adapter, tiny_model)
    refused("another base", save_tiny(tmp_path / "sibling", seed=9), adapter, args=args_of)


def test_vocabulary_that_grew_in_half(tiny_model: Path, tmp_path: Path, args_of: ArgsOf) -> None:
    adapter = make_adapter(tiny_model, tmp_path / "adapter", rows=384)
    edit_weights(adapter, lambda w: w.pop("base_model.model.lm_head.weight"))
    refused("do not carry all", tiny_model, adapter, args=args_of)


def test_number_too_large_for_its_type(tmp_path: Path, args_of: ArgsOf) -> None:
    base = save_tiny(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][3] = 70000
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    refused(
        r"model\.norm\.weight are too large for float16", base, args=args_of, export_dtype="float16"
    )


def test_base_files(tmp_path: Path, args_of: ArgsOf) -> None:
    base = save_tiny(tmp_path / "base")
    weights, text = (base / "model.safetensors"), (base / "config.json").read_text()
    (base / "config.json").write_text("[1]")
    refused("not a JSON object", base, args=args_of)
    (base / "config.json").write_text(text[:-9])
    refused("cannot be read", base, args=args_of)
    (base / "config.json").write_text(text)
    edit = json.loads(text) | {"quantization_config": {"quant_method": "gptq"}}
    (base / "config.json").write_text(json.dumps(edit))
    refused("quantised", base, args=args_of, export_dtype="float16")
    (base / "config.json").write_text(text)
    weights.write_bytes(weights.read_bytes()[:-4])
    refused("cut short", base, args=args_of)
    weights.rename(base / "pytorch_model.bin")
    refused("pickled", base, args=args_of)
    (base / "tokenizer.json").unlink()


def test_tokenizer(tmp_path: Path, args_of: ArgsOf) -> None:
    base = save_tiny(tmp_path / "base")
    path = base / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 400, "content": "<new>"})
    path.write_text(json.dumps(content))
    refused("token id 400, 320 embeddings|more tokens", base, args=args_of)
    path.write_text("{")
    refused("tokenizer is damaged", base, args=args_of)
    path.unlink()
    refused("no tokenizer", base, args=args_of)


def test_options(tiny_model: Path, args_of: ArgsOf) -> None:
    for change in ({"quantization_bit": 4}, {"train_from_scratch": True}):
        with pytest.raises(ConfigError, match="cannot be exported"):
            export_model(args_of(tiny_model, **change), ExportArgs(export_dir="never"))
    with pytest.raises(ConfigError, match="--export_dir"):
        export_model(args_of(tiny_model), ExportArgs())


def command(base: Path, target: Path) -> list[str]:
    words = ["export", "--model_name_or_path", str(base), "--export_dir", str(target)]
    return [sys.executable, "-m", "llmtuner.cli.main", *words]


def test_full_disk(tiny_model: Path, tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    before = {path: path.read_bytes() for path in tiny_model.iterdir()}
    ran = subprocess.run(
        command(tiny_model, tmp_path / "out"),
        cwd=SOURCE,
        preexec_fn=limit,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 6, ran.stderr
    assert "cannot be written (File too large)" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert list(tmp_path.iterdir()) == []
    assert before == {path: path.read_bytes() for path in tiny_model.iterdir()}


def test_too_small_disk(
    tiny_model: Path, tmp_path: Path, args_of: ArgsOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(StorageError, match="too small"):
        export_model(args_of(tiny_model), ExportArgs(export_dir=str(tmp_path / "out")))
    assert list(tmp_path.iterdir()) == []


def test_the_merge_imports_no_slow_library(tiny_model: Path, adapter: Path, tmp_path: Path) -> None:
    words = [*command(tiny_model, tmp_path / "out")[3:], "--adapter_name_or_path", str(adapter)]
    code = (
        "import sys; from llmtuner.cli.main import main; assert main(sys.argv[1:]) == 0; "
        "names = ('torch', 'transformers', 'peft', 'accelerate', 'datasets', 'huggingface_hub'); "
        "print(*[name for name in names if name in sys.modules])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=SOURCE, capture_output=True, text=True
    )
    assert ran.stdout.splitlines()[1:] == [""], ran.stderr


def test_a_link_is_followed_and_a_mount_point_refused(
    tiny_model: Path, tmp_path: Path, args_of: ArgsOf
) -> None:
    (tmp_path / "disk" / "empty").mkdir(parents=True)
    for name in ("empty", "new"):
        link = tmp_path / name
        link.symlink_to(tmp_path / "disk" / name)
        report = export_model(args_of(tiny_model), ExportArgs(export_dir=str(link)))
        assert report.export_dir == tmp_path / "disk" / name
        assert (link / "config.json").is_file()
    with pytest.raises(ConfigError, match="mount point"):
        export_model(args_of(tiny_model), ExportArgs(export_dir="/proc"))
