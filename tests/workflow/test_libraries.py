"""A training run, from its command to its last file, loads no library that it does not use."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"
UNUSED = (
    *("bitsandbytes", "deepspeed", "matplotlib", "tensorboard", "trl", "sklearn", "scipy"),
    *("networkx", "torch._inductor.lowering", "torch._inductor.compile_fx", "triton"),
)
PROGRAM = f"""
import sys
from llmtuner.cli.main import main
code = main(sys.argv[1:])
print(*[name for name in {UNUSED} if name in sys.modules])
if code == 0 and "{{then}}":
    code = main([*sys.argv[1:], "--overwrite_output_dir", *"{{then}}".split()])
    print(*[name for name in {UNUSED} if name in sys.modules])
sys.exit(code)
"""


def libraries_of(
    model_dir: Path, data_dir: Path, output_dir: Path, *flags: str, then: str = ""
) -> list[str]:
    """Train a step in a process of its own; return which of the unused libraries are there.

    Args:
        model_dir: a tiny model.
        data_dir: with the data set `qa`.
        output_dir: takes the results.
        flags: more options.
        then: options of a second run in the same process.
    """
    words = ["train", "--stage", "sft", "--do_train", "--model_name_or_path", str(model_dir)]
    words += ["--dataset", "qa", "--dataset_dir", str(data_dir), "--output_dir", str(output_dir)]
    words += ["--max_steps", "1", "--use_cpu", "--no_plot_loss", *flags]
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(then=then), *words],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()[-1].split()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_training_loads_no_unused_library(
    model_dir: Path, data_dir: Path, tmp_path: Path, method: str
) -> None:
    assert libraries_of(model_dir, data_dir, tmp_path, "--finetuning_type", method) == []


@pytest.mark.slow
def test_a_library_that_a_run_asks_for_is_loaded(
    model_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    loaded = libraries_of(model_dir, data_dir, tmp_path, "--report_to", "tensorboard")
    assert "tensorboard" in loaded


@pytest.mark.slow
def test_a_quantised_run_follows_a_plain_one_in_the_same_process(
    model_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    loaded = libraries_of(model_dir, data_dir, tmp_path, then="--quantization_bit 4")
    assert "bitsandbytes" in loaded
