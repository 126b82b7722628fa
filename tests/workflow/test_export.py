"""Train, export, verify: the exported folder is what was trained, and planted faults are found."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from llmtuner.cli.main import main
from llmtuner.extras.errors import ModelError
from llmtuner.hparams.data import DataArgs
from llmtuner.hparams.export import ExportArgs
from llmtuner.hparams.model import ModelArgs
from llmtuner.inference.verify_export import verify_export
from llmtuner.model.export import export_model

SOURCE = Path(__file__).parents[2] / "src"
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def adapter(model_dir: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained adapter; read only."""
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    argv = [
        "train", "--do_train", "--model_name_or_path", str(model_dir), "--dataset", "few",
        "--dataset_dir", str(data_dir), "--output_dir", str(folder), "--max_steps", "4",
        "--lora_rank", "4", "--learning_rate", "1e-2", "--no_bf16", "--disable_tqdm", "true",
    ]  # fmt: skip
    assert main(argv) == 0
    return folder


def export(*words: str) -> int:
    return main(["export", *words])


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
@pytest.mark.parametrize("template", [(), ("--template", "chatml")])
def test_export_is_verified(
    dtype: str,
    template: tuple[str, ...],
    adapter: Path,
    model_dir: Path,
    data_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    words = ["--model_name_or_path", str(model_dir), "--adapter_name_or_path", str(adapter)]
    words += ["--dataset_dir", str(data_dir), "--dataset", "few", "--export_dtype", dtype]
    words += ["--export_dir", str(tmp_path / "merged"), "--verify", *template]
    assert export(*words) == 0
    said = capsys.readouterr().out
    assert "on 4 prompts" in said
    assert "20 weights are the merged ones" in said
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    chat = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def scaled(adapter: Path) -> None:
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"lora_alpha": config["lora_alpha"] * 1.1}))


def without_a_module(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    save_file({name: w for name, w in weights.items() if "1.mlp.up_proj" not in name}, path)


def rounded(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    weights["model.norm.weight"] *= 1.002
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def renamed(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    weights["model.norm.scale"] = weights.pop("model.norm.weight")
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def other_token(folder: Path) -> None:
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    (folder / "tokenizer.json").write_text(text.replace('"<|endoftext|>"', '"<|end|>"'))


def other_template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text(encoding="utf-8").replace("<|im_end|>\n", "<|im_end|>"))


def other_stop(folder: Path) -> None:
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 0}))


def no_change(folder: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("plant", "spoil", "problem"),
    [
        (scaled, no_change, "is not the merged weight"),
        (without_a_module, no_change, r"1\.mlp\.up_proj\.weight is not the merged"),
        (no_change, rounded, r"model\.norm\.weight is not the merged"),
        (no_change, renamed, "other names"),
        (no_change, other_token, "the tokenizer"),
        (no_change, other_template, "the chat template"),
        (no_change, other_stop, "stops at other ids"),
        (no_change, no_change, None),
    ],
)
def test_planted_fault_is_found(
    plant: Callable[[Path], None],
    spoil: Callable[[Path], None],
    problem: str | None,
    adapter: Path,
    model_dir: Path,
    tmp_path: Path,
) -> None:
    def args(folder: Path) -> ModelArgs:
        return ModelArgs(model_name_or_path=str(model_dir), adapter_name_or_path=(str(folder),))

    def finish(folder: Path) -> None:
        spoil(folder)
        verify_export(folder, args(adapter), DataArgs(), num_prompts=2)

    faulty = Path(shutil.copytree(adapter, tmp_path / "faulty"))
    plant(faulty)
    target = ExportArgs(export_dir=str(tmp_path / "place" / "merged"))
    if problem is None:
        export_model(args(faulty), target, finish=finish)
        return
    with pytest.raises(ModelError, match=problem) as caught:
        export_model(args(faulty), target, finish=finish)
    assert caught.value.exit_code == 4
    assert list((tmp_path / "place").iterdir()) == []


def test_logits_alone_find_a_fault(adapter: Path, model_dir: Path, tmp_path: Path) -> None:
    from llmtuner.inference import verify_export as module

    args = ModelArgs(model_name_or_path=str(model_dir), adapter_name_or_path=(str(adapter),))
    plain = ModelArgs(model_name_or_path=str(model_dir))
    export_model(plain, ExportArgs(export_dir=str(tmp_path / "base")))
    one = module._answer(module._load_exported(tmp_path / "base", plain), [5, 6, 7], [2])
    other = module._answer(module._load_reference(args, rows=None), [5, 6, 7], [2])
    with pytest.raises(ModelError, match="other logits"):
        module._compare(one, other, module.LOGIT_BOUNDS["F32"])
    assert module._compare(one, one, module.LOGIT_BOUNDS["F32"]) == (0.0, False)


@pytest.fixture(scope="session")
def larger_model(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that takes a moment to write: 60 MB."""
    folder = Path(shutil.copytree(model_dir, tmp_path_factory.mktemp("larger") / "model"))
    config = LlamaConfig.from_pretrained(model_dir, vocab_size=60_000, hidden_size=256)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def _sigint_is_heard() -> Iterator[None]:
    """Let processes started here hear SIGINT, also where this one was told to ignore it (nohup).

    An ignored signal stays ignored in a new program; one with a handler goes back to its default.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt(place: Path, words: list[str], stop: signal.Signals) -> subprocess.Popen:
    """Start an export, hold it in the midst of writing, and stop it there."""
    for _ in range(10):
        process = subprocess.Popen(
            [sys.executable, "-m", "llmtuner.cli.main", "export", *words],
            cwd=SOURCE,
            stderr=subprocess.DEVNULL,
        )
        while not list(place.glob(".out.*/*")) and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        is_writing = any(place.glob(".out.*")) and not (place / "out").exists()
        process.send_signal(stop)
        process.send_signal(signal.SIGCONT)
        process.wait()
        if is_writing:
            return process
        shutil.rmtree(place / "out")  # it was quicker
    pytest.fail("the export was always quicker than the signal")


@pytest.mark.usefixtures("_sigint_is_heard")
@pytest.mark.parametrize(
    ("stop", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)],
)
def test_interruption_leaves_no_model(
    stop: signal.Signals, code: int, larger_model: Path, tmp_path: Path
) -> None:
    place = tmp_path / "new"
    words = ["--model_name_or_path", str(larger_model), "--export_dir", str(place / "out")]
    process = interrupt(place, words, stop)
    assert process.returncode == code
    left = [path.name for path in place.iterdir()]
    assert left == ([f".out.staging-{process.pid}"] if stop == signal.SIGKILL else [])
    assert export(*words) == 0
    assert [path.name for path in place.iterdir()] == ["out"]
    assert AutoModelForCausalLM.from_pretrained(place / "out").config.vocab_size == 60_000


def test_help_says_what_is_exported(capsys: pytest.CaptureFixture) -> None:
    assert export("--help") == 0
    said = capsys.readouterr().out
    for name in ("export_dir", "export_dtype", "verify", "export_hub_model_id"):
        assert f"--{name} " in said
