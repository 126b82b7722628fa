"""How fast rows become tokens beside the tokenizer alone, in which memory, and the second start.

    python benchmarks/data.py --model models/smollm2-135m-instruct --rows 30000 300000 1000000

Speed is measured in one process, in turns: the Rust tokenizer on the very texts (`encode_batch`,
and `encode_batch_fast`, which leaves out offsets), and the whole way from file to store: read,
check, render, prove, tokenise, mask, write; with and without the audit. Every row count is then
built in a process of its own, and started again from the cache in another one. Memory is what the
process itself holds (`RssAnon`, at its highest), not the files that the system keeps for it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count, cycle, islice
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHIPPED = ("identity.json", "tcm_alpaca.json")
BATCH = 1000
SAMPLED_S = 0.05


def main() -> None:
    """Measure, and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder with the tokenizer")
    parser.add_argument("--data", type=Path, help="alpaca rows; default: those in data/")
    parser.add_argument("--speed_rows", type=int, default=10_000)
    parser.add_argument("--rows", type=int, nargs="*", default=[30_000, 300_000, 1_000_000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", choices=["speed", "build"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child == "speed":
        measure_speed(options)
    elif options.child == "build":
        print(json.dumps(build_once(options.model, options.data, with_audit=True)))
    else:
        run_all(options)


def run_all(options: argparse.Namespace) -> None:
    """Make the rows, and measure each thing in a process of its own."""
    print(f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory(prefix="data-benchmark-") as folder:
        work = Path(folder)
        rows = list(read_rows(options.data))
        speed = write_rows(work / "speed.jsonl", rows, options.speed_rows)
        words = ["--model", str(options.model), "--repeats", str(options.repeats)]
        start_child("speed", [*words, "--data", str(speed)], work / "cache-speed").wait()
        print(f"{'rows':>9}{'tokens':>13}{'first':>9}{'memory':>10}{'second':>9}{'memory':>10}")
        for number in options.rows:
            path = write_rows(work / "rows.jsonl", rows, number)
            own = [*words, "--data", str(path)]
            runs = [watch("build", own, work / "cache") for _ in range(2)]
            (first, held), (second, held_again) = runs
            print(
                f"{number:>9}{first['tokens']:>13}{first['seconds']:>7.1f} s{held / 1e6:>7.0f} MB"
                f"{second['seconds']:>7.2f} s{held_again / 1e6:>7.0f} MB",
                flush=True,
            )


def read_rows(path: Path | None) -> Iterator[dict[str, str]]:
    """Yield alpaca rows of a JSON file, or of the shipped ones."""
    paths = [path] if path is not None else [ROOT / "data" / name for name in SHIPPED]
    for one in paths:
        yield from json.loads(one.read_text(encoding="utf-8"))


def write_rows(path: Path, rows: Sequence[dict[str, str]], number: int) -> Path:
    """Write that many different rows: the given ones again and again, each with its number."""
    with path.open("w", encoding="utf-8") as file:
        for row, place in zip(islice(cycle(rows), number), count(1), strict=False):
            own = {**row, "output": f"{row['output']} ({place})"}
            file.write(json.dumps(own, ensure_ascii=False) + "\n")
    return path


def start_child(name: str, words: Sequence[str], cache: Path) -> "subprocess.Popen[str]":
    """Start this file again for one measurement."""
    return subprocess.Popen(
        [sys.executable, __file__, "--child", name, *words],
        env={**os.environ, "LLMTUNER_CACHE": str(cache), "PYTHONPATH": str(ROOT / "src")},
        stdout=subprocess.PIPE if name == "build" else None,
        text=True,
    )


def watch(name: str, words: Sequence[str], cache: Path) -> tuple[dict[str, float], int]:
    """Run a measurement; return what it says, and its memory at its highest, in bytes."""
    child = start_child(name, words, cache)
    highest = 0
    while child.poll() is None:
        highest = max(highest, own_memory(child.pid))
        time.sleep(SAMPLED_S)
    assert child.stdout is not None
    return json.loads(child.stdout.read()), highest


def own_memory(process_id: int) -> int:
    """Return what a process holds without files, in bytes; 0 when it has ended."""
    try:
        status = Path(f"/proc/{process_id}/status").read_text(encoding="ascii")
    except OSError:
        return 0
    sizes = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")]
    return int(sizes[0]) * 1024 if sizes else 0


def build_once(model: Path, path: Path, *, with_audit: bool) -> dict[str, float]:
    """Build the data set of one file by the way that training takes."""
    from transformers import AutoTokenizer  # only the children wait for it

    from llmtuner.data.build import build_datasets
    from llmtuner.data.encoders.sft import build_encoder
    from llmtuner.hparams.audit import AuditArgs
    from llmtuner.hparams.data import DataArgs

    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    args = DataArgs(dataset=(str(path),), overwrite_cache=False)
    encode = build_encoder(args, tokenizer)
    start = time.perf_counter()
    built = build_datasets(
        args,
        encode=encode,
        seed=1,
        packing=False,
        for_training=True,
        audit=AuditArgs(audit=with_audit),
    )
    seconds = time.perf_counter() - start
    (counts,) = built.report["datasets"].values()
    return {"seconds": seconds, "tokens": counts["tokens"]}


def measure_speed(options: argparse.Namespace) -> None:
    """Measure the tokenizer alone and the whole way in turns, and print the medians."""
    from transformers import AutoTokenizer

    from llmtuner.extras.env import process_env

    tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=False)
    backend = tokenizer.backend_tokenizer
    cache = process_env().cache_dir
    texts = texts_of(options.data, tokenizer)

    def alone(encode: Callable[..., list]) -> int:
        parts = [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]
        return sum(len(one.ids) for part in parts for one in encode(part, add_special_tokens=False))

    def whole_way(*, with_audit: bool) -> int:
        for store in (cache / "tokens").glob("*/rows.arrow"):
            store.unlink()  # so that it is built again
        return int(build_once(options.model, options.data, with_audit=with_audit)["tokens"])

    ways: dict[str, Callable[[], int]] = {
        "encode_batch": lambda: alone(backend.encode_batch),
        "encode_batch_fast": lambda: alone(backend.encode_batch_fast),
        "whole way": lambda: whole_way(with_audit=False),
        "whole way, audit": lambda: whole_way(with_audit=True),
    }
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(options.repeats):
        for name, way in ways.items():
            start, before = time.perf_counter(), cpu_seconds()
            tokens = way()
            runs[name].append(
                (tokens / (time.perf_counter() - start), (cpu_seconds() - before) / tokens)
            )
    print(f"{'':<20}{'tokens/s':>12}{'of it':>8}{'CPU us/token':>14}{'of it':>8}")
    first_rate, first_cost = map(statistics.median, zip(*runs["encode_batch"], strict=True))
    for name, pairs in runs.items():
        rate, cost = map(statistics.median, zip(*pairs, strict=True))
        shares = f"{rate:>12,.0f}{rate / first_rate:>8.2f}{1e6 * cost:>14.2f}"
        print(f"{name:<20}{shares}{first_cost / cost:>8.2f}", flush=True)


def texts_of(path: Path, tokenizer: object) -> list[str]:
    """Return the rendered texts of all rows, whose ids are those of the samples."""
    lines = path.read_text(encoding="utf-8").splitlines()
    texts = []
    for row in map(json.loads, lines):
        asked = "\n".join(part for part in (row["instruction"], row.get("input")) if part)
        chat = [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]
        texts.append(tokenizer.apply_chat_template(chat, tokenize=False))
    return texts


def cpu_seconds() -> float:
    """Return what this process and its children have computed so far, in seconds."""
    return sum(os.times()[:4])


if __name__ == "__main__":
    main()
