"""How fast rows become tokens beside the tokenizer alone, in which memory, and the second start.

    python benchmarks/data.py --model models/smollm2-135m-instruct --rows 30000 300000 1000000
    python benchmarks/data.py --model models/smollm2-135m-instruct --rows --peer PEER/bin/python

Speed is measured in one process, in turns: the Rust tokenizer on the very texts (`encode_batch`,
and `encode_batch_fast`, which leaves out offsets), and the whole way from file to store: read,
check, render, prove, tokenise, mask, write; with and without the audit. Every row count is then
built in a process of its own, and started again from the cache in other ones: as it was, with a
validation split, and with packing, twice, for the first time stores the packs. Memory is what the
process and its workers hold by themselves (`Pss_Anon`, at its highest), not the files that the
system keeps for them. `--peer` is the Python of an environment with LLaMA-Factory, which reads and
tokenises the same rows with the same template and cutoff, in turns with us, and with a new folder
as its cache every time.
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
from typing import Any

ROOT = Path(__file__).parents[1]
SHIPPED = ("identity.json", "tcm_alpaca.json")
BATCH = 1000
CUTOFF = 2048
SAMPLED_S = 0.1
# What a run of LLaMA-Factory does between its arguments and its model.
PEER = """
import json, sys, time
from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
from llamafactory.hparams import get_train_args
from llamafactory.model import load_tokenizer
model, data, training, *_ = get_train_args(json.loads(sys.argv[1]))
loaded = load_tokenizer(model)
template = get_template_and_fix_tokenizer(loaded["tokenizer"], data)
start = time.perf_counter()
found = get_dataset(template, model, data, training, stage="sft", **loaded)["train_dataset"]
seconds = time.perf_counter() - start
tokens = sum(map(len, found["input_ids"]))
print(json.dumps({"seconds": seconds, "rows": len(found), "tokens": tokens}))
"""


def main() -> None:
    """Measure, and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder with the tokenizer")
    parser.add_argument("--data", type=Path, help="alpaca rows; default: those in data/")
    parser.add_argument("--speed_rows", type=int, default=10_000)
    parser.add_argument("--rows", type=int, nargs="*", default=[30_000, 300_000, 1_000_000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer", type=Path, help="Python of an environment with LLaMA-Factory")
    parser.add_argument("--template", default="chatml", help="its name here and there, for --peer")
    parser.add_argument("--settings", default="{}", help=argparse.SUPPRESS)
    parser.add_argument("--child", choices=["speed", "build"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child == "speed":
        measure_speed(options)
    elif options.child == "build":
        settings = json.loads(options.settings)
        print(json.dumps(build_once(options.model, options.data, with_audit=True, **settings)))
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
        if options.peer:
            compare_with_peer(options, speed, words, work)
        for number in options.rows:
            path = write_rows(work / "rows.jsonl", rows, number)
            measure_starts(number, [*words, "--data", str(path)], work / f"cache-{number}")


def measure_starts(number: int, words: Sequence[str], cache: Path) -> None:
    """Build some rows, start again in several ways, and print times and memory."""
    print(f"{number} rows{'':<24}{'seconds':>10}{'memory, MB':>12}")
    split, packed = {"val_size": 1000}, {"packing": True}
    for name, settings in {
        "first start": {},
        "second start": {},
        "second start, split": split,
        "second start, first packs": packed,
        "second start, packs stored": packed,
    }.items():
        own = [*words, "--settings", json.dumps(settings)]
        ran, held = watch("build", own, cache)
        print(f"  {name:<30}{ran['seconds']:>10.2f}{held / 1e6:>12.0f}", flush=True)
    print(f"  {ran['tokens']} tokens")


def compare_with_peer(
    options: argparse.Namespace, path: Path, words: Sequence[str], work: Path
) -> None:
    """Tokenise the same rows here and in LLaMA-Factory, in turns, and print medians."""
    runs: dict[tuple[str, int], list[dict[str, float]]] = {}
    for turn in range(options.repeats):
        for workers in (1, 2):
            settings = {"template": options.template, "preprocessing_num_workers": workers}
            own = [*words, "--data", str(path), "--settings", json.dumps(settings)]
            ran, _ = watch("build", own, work / f"own-{turn}-{workers}")
            runs.setdefault(("llmtuner", workers), []).append(ran)
            ran = run_peer(options, path, workers, work / f"peer-{turn}-{workers}")
            runs.setdefault(("LLaMA-Factory", workers), []).append(ran)
    rates = {
        who: statistics.median(ran["rows"] / ran["seconds"] for ran in found)
        for who, found in runs.items()
    }
    print(f"template {options.template}{'':<13}{'rows/s':>9}{'tokens':>12}{'ratio':>8}")
    for (name, workers), rate in rates.items():
        tokens = runs[name, workers][0]["tokens"]
        ratio = rate / rates["LLaMA-Factory", workers]
        print(f"{name}, {workers} workers".ljust(28) + f"{rate:>9.0f}{tokens:>12.0f}{ratio:>8.1f}")


def run_peer(
    options: argparse.Namespace, path: Path, workers: int, cache: Path
) -> dict[str, float]:
    """Tokenise the rows with LLaMA-Factory, which finds no work of an earlier run in its cache."""
    columns = {"prompt": "instruction", "query": "input", "response": "output"}
    info = {"rows": {"file_name": path.name, "columns": columns}}
    (path.parent / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    settings = {
        **{"stage": "sft", "do_train": True, "model_name_or_path": str(options.model)},
        **{"dataset_dir": str(path.parent), "dataset": "rows", "template": options.template},
        **{"cutoff_len": CUTOFF, "preprocessing_num_workers": workers, "overwrite_cache": True},
        **{"output_dir": str(cache / "output"), "use_cpu": True, "report_to": "none"},
    }
    child = subprocess.run(
        [str(options.peer), "-c", PEER, json.dumps(settings)],
        env={**os.environ, "HF_DATASETS_CACHE": str(cache), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode:
        sys.exit(child.stderr)
    found: dict[str, float] = json.loads(child.stdout.splitlines()[-1])
    return found


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
        highest = max(highest, sum(map(own_memory, [child.pid, *children_of(child.pid)])))
        time.sleep(SAMPLED_S)
    assert child.stdout is not None
    return json.loads(child.stdout.read()), highest


def children_of(process_id: int) -> list[int]:
    """Return the processes that a process has started."""
    try:
        return list(
            map(int, Path(f"/proc/{process_id}/task/{process_id}/children").read_text().split())
        )
    except OSError:
        return []


def own_memory(process_id: int) -> int:
    """Return what a process holds without files, in bytes; of what it shares, its share.

    0 when it has ended.
    """
    try:
        status = Path(f"/proc/{process_id}/smaps_rollup").read_text(encoding="ascii")
    except OSError:
        return 0
    sizes = [line.split()[1] for line in status.splitlines() if line.startswith("Pss_Anon")]
    return int(sizes[0]) * 1024 if sizes else 0


def build_once(model: Path, path: Path, *, with_audit: bool, **settings: Any) -> dict[str, float]:
    """Build the data set of one file by the way that training takes.

    Args:
        model: folder with the tokenizer.
        path: the rows.
        with_audit: whether they are audited.
        settings: options of the data.
    """
    from transformers import AutoTokenizer  # only the children wait for it

    from llmtuner.data.build import build_datasets
    from llmtuner.data.encoders.sft import build_encoder
    from llmtuner.hparams.audit import AuditArgs
    from llmtuner.hparams.data import DataArgs

    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    args = DataArgs(dataset=(str(path),), cutoff_len=CUTOFF, **settings)
    encode = build_encoder(args, tokenizer)
    start = time.perf_counter()
    built = build_datasets(
        args,
        encode=encode,
        seed=1,
        packing=bool(args.packing),
        for_training=True,
        audit=AuditArgs(audit=with_audit),
    )
    seconds = time.perf_counter() - start
    (counts,) = built.report["datasets"].values()
    return {"seconds": seconds, "rows": counts["rows"], "tokens": counts["tokens"]}


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
