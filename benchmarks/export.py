"""Memory and time of an export: a model, and one of ten times its size made of random numbers.

    python benchmarks/export.py --model models/smollm2-135m-instruct --adapter output/sft

Every export runs in a process of its own. The peak is that of the process, imports included
(`VmHWM`), and the time is from its start to its end. The large model is written to a temporary
folder, needs 3 GB there (and its export 3 GB more), and is deleted at the end.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SOURCE = Path(__file__).parents[1] / "src"
LARGE = {"hidden_size": 1920, "num_hidden_layers": 30, "intermediate_size": 5504}
RANK = 8
SHARD_BYTES = 10**9
# The kernel's own count; getrusage would begin with the size of the process that started it.
CHILD = """
import sys
from llmtuner.cli.main import main
code = main(sys.argv[1:])
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")))
sys.exit(code)
"""


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of the small model")
    parser.add_argument("--adapter", type=Path, help="its adapter; default: random numbers")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="export-benchmark-") as name:
        work = Path(name)
        small_shapes = llama_shapes(json.loads((options.model / "config.json").read_text()))
        adapter = options.adapter or random_adapter(work / "adapter", small_shapes)
        large, large_shapes = random_model(work / "large", options.model)
        large_adapter = random_adapter(work / "large-adapter", large_shapes)
        print(f"load {' '.join(f'{load:.1f}' for load in os.getloadavg())}, {os.cpu_count()} cores")
        headings = f"{'runs':>6}{'time, median':>14}{'best':>8}{'CPU':>8}{'peak':>10}"
        print(f"{'model':<8}{'weights':>10}{headings}")
        peaks = []
        for label, base, lora in (
            ("small", options.model, adapter),
            ("large", large, large_adapter),
        ):
            runs = [measure(base, lora, work / "out") for _ in range(options.repeats)]
            seconds, busy, bytes_ = zip(*runs, strict=True)
            peaks.append(max(bytes_))
            size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
            middle, computed = statistics.median(seconds), statistics.median(busy)
            print(
                f"{label:<8}{size / 1e6:>7.0f} MB{len(runs):>6}{middle:>12.2f} s"
                f"{min(seconds):>6.2f} s{computed:>6.2f} s{max(bytes_) / 1e6:>7.0f} MB"
            )
        print(f"peak of the large model over the small one's: {peaks[1] / peaks[0]:.3f}")


def measure(base: Path, adapter: Path, target: Path) -> tuple[float, float, int]:
    """Export once; return seconds, seconds of computing, and the peak of the process in bytes."""
    words = ["--model_name_or_path", str(base), "--adapter_name_or_path", str(adapter)]
    before = cpu_seconds()
    start = time.perf_counter()
    ran = subprocess.run(
        [sys.executable, "-c", CHILD, "export", *words, "--export_dir", str(target)],
        cwd=SOURCE,
        capture_output=True,
        text=True,
    )
    seconds = time.perf_counter() - start
    if ran.returncode != 0:
        raise SystemExit(f"the export failed: {ran.stderr}")
    shutil.rmtree(target)
    return seconds, cpu_seconds() - before, int(ran.stdout.split()[-2]) * 1024


def cpu_seconds() -> float:
    """Return what all finished child processes have computed."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def llama_shapes(config: dict) -> dict[str, tuple[int, int]]:
    """Return the matrices of a Llama's layers by module name."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries = head * config["num_attention_heads"]
    keys = head * config["num_key_value_heads"]
    matrices = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    layers = range(config["num_hidden_layers"])
    return {f"model.layers.{n}.{name}": size for n in layers for name, size in matrices.items()}


def random_model(folder: Path, like: Path) -> tuple[Path, dict[str, tuple[int, int]]]:
    """Write a Llama of random bfloat16 numbers, ten times as large, one tensor at a time."""
    folder.mkdir()
    for path in like.iterdir():
        if path.suffix in (".json", ".jinja") and "safetensors" not in path.name:
            shutil.copyfile(path, folder / path.name)
    config = json.loads((folder / "config.json").read_text()) | LARGE
    config |= {"num_attention_heads": 30, "num_key_value_heads": 10, "head_dim": 64}
    (folder / "config.json").write_text(json.dumps(config))
    matrices = llama_shapes(config)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], config["hidden_size"]),
        "model.norm.weight": (config["hidden_size"],),
        **{f"{name}.weight": size for name, size in matrices.items()},
    }
    for layer in range(config["num_hidden_layers"]):
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{name}.weight"] = (config["hidden_size"],)
    weight_map: dict[str, str] = {}
    shard: dict[str, tuple[int, ...]] = {}
    for name, shape in [*shapes.items(), (None, ())]:
        if shard and (name is None or sum(map(num_bytes, shard.values())) > SHARD_BYTES):
            file = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
            write_tensors(folder / file, shard, "BF16")
            weight_map |= dict.fromkeys(shard, file)
            shard = {}
        if name is not None:
            shard[name] = shape
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder, matrices


def random_adapter(folder: Path, matrices: dict[str, tuple[int, int]]) -> Path:
    """Write a LoRA of random numbers on every matrix."""
    folder.mkdir()
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (out, inside) in matrices.items():
        shapes[f"base_model.model.{name}.lora_A.weight"] = (RANK, inside)
        shapes[f"base_model.model.{name}.lora_B.weight"] = (out, RANK)
    write_tensors(folder / "adapter_model.safetensors", shapes, "F32")
    return folder


def write_tensors(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str) -> None:
    """Write random tensors to a safetensors file, one at a time."""
    width = {"BF16": 2, "F32": 4}[dtype]
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + num_bytes(shape, width)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = np.random.default_rng(0)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for shape in shapes.values():
            numbers = generator.standard_normal(shape, np.float32) * np.float32(0.02)
            halves = (numbers.view(np.uint32) >> 16).astype(np.uint16)
            file.write((halves if dtype == "BF16" else numbers).data.cast("B"))


def num_bytes(shape: tuple[int, ...], width: int = 2) -> int:
    """Return the size of a tensor."""
    return int(np.prod(shape)) * width


if __name__ == "__main__":
    main()
