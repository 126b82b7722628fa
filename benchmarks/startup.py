"""How long a user waits: for help, and from the command to the first optimizer step.

    python benchmarks/startup.py --model models/smollm2-135m-instruct --peer PEER/bin/python

Every run is a process of its own. A training run (LoRA) is told apart into its imports, the model's
load, and the rest up to the moment when the first optimizer step begins (settings, tokenizer,
contract, tokens from the cache, plan, trainer); then the step itself. The first run fills the
caches and does not count. `--peer` is the Python of an environment with LLaMA-Factory: its runs
take turns with ours, with its own fastest settings on a CPU and its own store of tokens.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMMANDS = ("", "train", "export", "eval", "chat", "data audit", "plan")
HELP = "import sys; from llmtuner.cli.main import main; sys.exit(main(sys.argv[1:]))"
PEER_HELP = "from llamafactory.cli import main; main()"
# The first word is when the process was started; times of the parts are read where they end.
TRAIN = """
import json, sys, time
started = float(sys.argv.pop(1))
{imports}
from transformers.trainer_callback import CallbackHandler
marks = {{"imports": time.time() - started}}
load, begin, end = {owner}.{load}, CallbackHandler.on_step_begin, CallbackHandler.on_step_end
def timed(*words, **settings):
    before = time.time()
    model = load(*words, **settings)
    marks.setdefault("model", time.time() - before)
    return model
def begins(*words, **settings):
    marks.setdefault("begins", time.time() - started)
    return begin(*words, **settings)
def ends(*words, **settings):
    marks.setdefault("ends", time.time() - started)
    return end(*words, **settings)
{owner}.{load} = timed
CallbackHandler.on_step_begin, CallbackHandler.on_step_end = begins, ends
{run}
print(json.dumps(marks))
"""
OURS = TRAIN.format(
    imports="""
from llmtuner.cli.main import main
from llmtuner.extras.libraries import loading_libraries
with loading_libraries():
    import llmtuner.train.stages.sft
import llmtuner.train.prepare as prepare""",
    owner="prepare",
    load="load_for_run",
    run="assert main(sys.argv[1:]) == 0",
)
PEERS = TRAIN.format(
    imports="""
from llamafactory.cli import main
import llamafactory.launcher
import llamafactory.train.tuner
import llamafactory.train.sft.workflow as workflow""",
    owner="workflow",
    load="load_model",
    run="main()",
)


@dataclass(frozen=True)
class Ran:
    """What a program printed, and what it took."""

    printed: str
    seconds: float
    peak_bytes: int


def main() -> None:
    """Measure, and print medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--dataset", default="identity", help="as `llmtuner train` takes it")
    parser.add_argument("--peer", type=Path, help="Python of an environment with LLaMA-Factory")
    parser.add_argument(
        "--peer_template", default="chatml", help="the peer's name for the template"
    )
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print(f"{time.strftime('%d %B %Y')}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    helps = {f"llmtuner {name} --help": [*name.split(), "--help"] for name in COMMANDS}
    for name, words in helps.items():
        _report_help(name, [sys.executable, "-c", HELP, *words], options.repeats)
    if options.peer:
        for words in (["help"], ["train", "--help"]):
            command = [str(options.peer), "-c", PEER_HELP, *words]
            _report_help(f"LLaMA-Factory {' '.join(words)}", command, options.repeats)
    with tempfile.TemporaryDirectory(prefix="startup-benchmark-") as folder:
        contenders: dict[str, Callable[[], Ran]] = {
            "llmtuner": partial(_train, options, Path(folder))
        }
        if options.peer:
            contenders["LLaMA-Factory"] = partial(_train_peer, options, Path(folder))
        _report_training(contenders, options.repeats)


def _report_help(name: str, command: Sequence[str], repeats: int) -> None:
    """Print the median time and the peak memory of a program."""
    runs = [_run(command) for _ in range(repeats + 1)][1:]
    seconds = statistics.median(run.seconds for run in runs)
    peak = statistics.median(run.peak_bytes for run in runs)
    print(f"{' '.join(name.split()):<36}{seconds:>8.2f} s {peak / 1e6:>8.0f} MB", flush=True)


def _report_training(contenders: Mapping[str, Callable[[], Ran]], repeats: int) -> None:
    """Print the median parts of the contenders' runs, which take turns."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for number in range(repeats + 1):
        for name, train in contenders.items():
            ran = train()
            if number:
                runs[name].append(_parts(ran))
    print(f"{'':<36}" + "".join(f"{name:>16}" for name in runs))
    for part in next(iter(runs.values()))[0]:
        values = [statistics.median(run[part] for run in found) for found in runs.values()]
        print(f"{part:<36}" + "".join(f"{value:>16.2f}" for value in values))


def _parts(ran: Ran) -> dict[str, float]:
    marks = json.loads(ran.printed.splitlines()[-1])
    return {
        "imports, s": marks["imports"],
        "loading the model, s": marks["model"],
        "the rest before the first step, s": marks["begins"] - marks["imports"] - marks["model"],
        "all before the first step, s": marks["begins"],
        "the first step, s": marks["ends"] - marks["begins"],
        "peak memory of the run, GB": ran.peak_bytes / 1e9,
    }


def _train(options: argparse.Namespace, work: Path) -> Ran:
    """Train one step with llmtuner."""
    words = ["train", "--stage", "sft", "--do_train", "--model_name_or_path", str(options.model)]
    words += ["--dataset", options.dataset, "--output_dir", str(work / "output")]
    words += ["--overwrite_output_dir", "--max_steps", "1", "--save_strategy", "no"]
    words += ["--use_cpu", "--no_plot_loss"]
    command = [sys.executable, "-c", OURS, str(time.time()), *words]
    return _run(command, LLMTUNER_CACHE=str(work / "cache"))


def _train_peer(options: argparse.Namespace, work: Path) -> Ran:
    """Train one step with LLaMA-Factory; its first run stores the tokens for the others."""
    settings = {
        **{"stage": "sft", "do_train": True, "model_name_or_path": str(options.model)},
        **{"dataset_dir": str(ROOT / "data"), "dataset": options.dataset},
        **{"template": options.peer_template, "tokenized_path": str(work / "tokens")},
        **{"finetuning_type": "lora", "lora_target": "all", "lora_rank": 8},
        **{"bf16": True, "disable_gradient_checkpointing": True, "use_cpu": True},
        **{"per_device_train_batch_size": 8, "max_steps": 1, "save_strategy": "no"},
        **{"report_to": "none", "output_dir": str(work / "peer"), "overwrite_output_dir": True},
    }
    path = work / "settings.yaml"
    path.write_text(json.dumps(settings), encoding="utf-8")
    return _run([str(options.peer), "-c", PEERS, str(time.time()), "train", str(path)])


def _run(command: Sequence[str], **variables: str) -> Ran:
    """Run a program in the folder of the project.

    Args:
        command: the program and its words.
        variables: more of the environment.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), **variables}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        streams = [(os.POSIX_SPAWN_DUP2, f.fileno(), n) for n, f in ((1, out), (2, errors))]
        started = time.perf_counter()
        child = os.posix_spawn(command[0], command, environment, file_actions=streams)
        _, status, used = os.wait4(child, 0)
        seconds = time.perf_counter() - started
        out.seek(0)
        if status:
            errors.seek(0)
            sys.exit(errors.read().decode(errors="replace"))
        return Ran(out.read().decode(), seconds, used.ru_maxrss * 1024)


if __name__ == "__main__":
    os.chdir(ROOT)  # where `data` is
    main()
