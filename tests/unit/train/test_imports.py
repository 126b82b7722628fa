"""A run loads the libraries that it needs, and no others."""

import subprocess
import sys

import pytest

UNNEEDED = (
    *("matplotlib", "deepspeed", "tensorboard", "wandb", "swanlab", "trl", "vllm", "sklearn"),
    *("jieba", "sacrebleu", "rouge_chinese", "gguf", "chromadb", "langchain", "IPython"),
    *("bitsandbytes", "scipy", "tensorflow", "jax", "flax", "torchvision", "torchaudio", "librosa"),
    *("networkx", "torch._inductor.lowering", "torch._inductor.compile_fx", "triton"),
)


def loaded_after(statement: str) -> list[str]:
    """Return which libraries of the list a fresh interpreter holds after a statement."""
    code = f"""
import sys
from llmtuner.extras.libraries import loading_libraries
with loading_libraries():
    {statement}
print(*[name for name in {UNNEEDED} if name in sys.modules])
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return ran.stdout.split()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "pt"])
def test_a_stage_loads_no_library_that_it_may_not_need(stage: str) -> None:
    assert loaded_after(f"import llmtuner.train.stages.{stage}") == []


def test_a_library_that_was_loaded_is_seen() -> None:
    assert loaded_after("sys.modules['trl'] = sys") == ["trl"]
