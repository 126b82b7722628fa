"""How long a user waits: for help, and from the command to the first optimizer step.

    python benchmarks/startup.py --model models/smollm2-135m-instruct --peer PEER/bin/python

Every run is a process of its own. A training run is told apart into its imports, the model's load,
and the rest up to the moment when the first optimizer step begins (settings, tokenizer, contract,
tokens from the cache, plan, trainer); then the step itself. The first run fills the caches and does
not count. `--peer` is the Python of an environment with LLaMA-Factory, for its imports and help.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMMANDS = ("", "train", "export", "eval", "chat", "data audit", "plan")
HELP = "import sys; from llmtuner.cli.main import main; main(sys.argv[1:])"
# The first word is when the process was started; times of the parts are read where they end.
TRAIN = """
import json, sys, time
started = float(sys.argv.pop(1))
from llmtuner.cli.main import main
from llmtuner.extras.libraries import loading_libraries
with loading_libraries():
    import llmtuner.train.stages.sft
import llmtuner.train.prepare as prepare
from transformers.trainer_callback import CallbackHandler
marks = {"imports": time.time() - started}
load, begin, end = prepare.load_for_run, CallbackHandler.on_step_begin, CallbackHandler.on_step_end
def timed(*words, **settings):
    before = time.time()
    model = load(*words, **settings)
    marks["model"] = time.time() - before
    return model
def begins(*words, **settings):
    marks.setdefault("begins", time.time() - started)
    return begin(*words, **settings)
def ends(*words, **settings):
    marks.setdefault("ends", time.time() - started)
    return end(*words, **settings)
prepare.load_for_run = timed
CallbackHandler.on_step_begin, CallbackHandler.on_step_end = begins, ends
code = main(sys.argv[1:])
print(json.dumps(marks))
sys.exit(code)
"""
PEER_IMPORT = "import llamafactory.train.tuner"
PEER_HELP = "import sys; sys.argv[1:] = ['version']; from llamafactory.cli import main; main()"


def main() -> None:
    """Measure, and print medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--dataset", default="identity", help="as `llmtuner train` takes it")
    parser.add_argument("--peer", type=Path, help="Python of an environment with LLaMA-Factory")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print(f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores")
    rows = {f"llmtuner {name} --help": [HELP, *name.split(), "--help"] for name in COMMANDS}
    report(rows, Path(sys.executable), options.repeats)
    if options.peer:
        report({"LLaMA-Factory version": [PEER_HELP]}, options.peer, options.repeats)
        report({"LLaMA-Factory imports": [PEER_IMPORT]}, options.peer, options.repeats)
    with tempfile.TemporaryDirectory(prefix="startup-benchmark-") as folder:
        runs = [train(options, Path(folder)) for _ in range(options.repeats + 1)][1:]
    for name in runs[0]:
        print(f"{name:<36}{statistics.median(run[name] for run in runs):>8.2f} s")


def report(rows: Mapping[str, Sequence[str]], python: Path, repeats: int) -> None:
    """Print the median time of each program."""
    for name, words in rows.items():
        seconds = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            run([str(python), "-c", *words])
            seconds.append(time.perf_counter() - start)
        label = " ".join(name.split())
        print(f"{label:<36}{statistics.median(seconds[1:]):>8.2f} s", flush=True)


def train(options: argparse.Namespace, work: Path) -> dict[str, float]:
    """Train one step; return the parts of the time before it, in seconds."""
    words = ["train", "--stage", "sft", "--do_train", "--model_name_or_path", str(options.model)]
    words += [
        "--dataset",
        options.dataset,
        "--output_dir",
        str(work / "output"),
        "--max_steps",
        "1",
    ]
    words += ["--overwrite_output_dir", "--save_strategy", "no", "--use_cpu", "--no_plot_loss"]
    printed = run([sys.executable, "-c", TRAIN, str(time.time()), *words], cache=work / "cache")
    marks = json.loads(printed.splitlines()[-1])
    return {
        "imports": marks["imports"],
        "loading the model": marks["model"],
        "the rest before the first step": marks["begins"] - marks["imports"] - marks["model"],
        "the first step": marks["ends"] - marks["begins"],
    }


def run(command: Sequence[str], cache: Path | None = None) -> str:
    """Run a program in the folder of the project; return what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    if cache is not None:
        environment["LLMTUNER_CACHE"] = str(cache)
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


if __name__ == "__main__":
    main()
