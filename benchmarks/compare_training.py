r"""Trains the same rows with llmtuner and with its peers on this machine, and compares.

    python benchmarks/compare_training.py --model models/smollm2-135m-instruct
    python benchmarks/compare_training.py --model DIR --data alpaca.json --peers_dir DIR \
        --peers llamafactory,trl,plain --methods lora,full,qlora --steps 12 --packing both

Each peer gets an environment of its own below `--peers_dir` (once; LLaMA-Factory needs about 6 GB
there). Every contender is a process of its own, started by the command that its users type, on the
same rows in the same order, with the same batch, rank and learning rate. The runs alternate. A
probe inside the process (`probe/sitecustomize.py`) counts tokens and times steps.

Only Linux: memory is the kernel's `VmHWM` of the training process, imports and saving included,
summed over ranks (which counts the libraries that they share more than once).
"""

import json
import re
import signal
import sys
import time
from argparse import ArgumentParser, Namespace
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from harness.environments import default_peers_dir, prepare_environment
from harness.jobs import OWN, Contender, Launch, Peer, Task, load_peers, select_contenders
from harness.machine import Machine, measure_machine, num_parameters
from harness.plots import plot
from harness.results import Figures, Measured, loss_distance, summarise
from harness.rows import num_packed_rows, read_alpaca, repeat_rows, write_rows
from harness.runs import run_contender
from harness.tables import agreement, figures_table, formula, ratios_table

_DATA = Path(__file__).parents[1] / "data" / "tcm_alpaca.json"
# Full training moves every weight: the rate that suits adapters would make it diverge.
_LEARNING_RATES = {"lora": 1e-4, "qlora": 1e-4, "full": 1e-5}


@dataclass
class Outcome:
    """What one method gave: all runs by contender, and the figures of those that worked."""

    method: str
    runs: dict[str, list[Measured]] = field(default_factory=dict)
    figures: dict[str, Figures] = field(default_factory=dict)

    def failures(self) -> dict[str, str]:
        """Return why contenders gave no figures."""
        return {name: runs[-1].failure for name, runs in self.runs.items() if runs[-1].failure}


def main() -> int:
    """Compare; return 1 if one of our losses is further from the peers' than `--allowed_loss`."""
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a running contender ends too
    all_peers = load_peers()
    peers = _chosen(all_peers, options.peers)
    parameters = num_parameters(options.model)  # bad input shows before gigabytes are installed
    data_dirs = _write_data(options)
    for name in sorted({peer.environment or peer.name for peer in peers}):
        prepare_environment(all_peers[name], options.peers_dir)
    machine = measure_machine()
    print(_machine_line(machine), flush=True)
    outcomes, near = [], True
    for method in options.methods.split(","):
        outcome = Outcome(method)
        chosen = [
            (peer, contender)
            for peer, contender in select_contenders(peers, method=method, packing=options.packing)
            if re.search(options.only, contender.name)
        ]
        _run_all(outcome, chosen, options, data_dirs)
        for contender, runs in outcome.runs.items():
            if any(not run.failure for run in runs):
                outcome.figures[contender] = summarise(
                    runs, method=method, parameters=parameters, gemm_flops=machine.gemm_flops
                )
        outcomes.append(outcome)
        near &= _report(outcome, chosen, options, parameters)
    if options.save_dir:
        _save(options, machine, outcomes)
    return 0 if near else 1


def _chosen(all_peers: dict[str, Peer], names: str) -> list[Peer]:
    wanted = [name for name in names.split(",") if name]
    unknown = sorted(set(wanted) - set(all_peers))
    if unknown:
        raise SystemExit(f"--peers: unknown {unknown}; allowed: {sorted(all_peers)}")
    return [peer for name, peer in all_peers.items() if name in wanted or name == OWN]


def _write_data(options: Namespace) -> dict[bool, Path]:
    """Write the rows of runs without and with packing; return their folders."""
    rows = read_alpaca(options.data)
    shape = {
        "model": options.model,
        "template": options.template,
        "cutoff_tokens": options.cutoff_len,
    }
    plain = options.work_dir / "rows"
    num_units = options.steps * options.batch_size
    samples = write_rows(repeat_rows(rows, num_units), plain, **shape)
    tokens = [len(sample.input_ids) for sample in samples]
    learned = sum(label != -100 for sample in samples for label in sample.labels)
    print(f"{num_units} rows, {sum(tokens)} tokens, {learned} supervised, longest {max(tokens)}")
    if options.packing == "off":
        return {False: plain}
    packed = options.work_dir / "rows-packed"
    count = num_packed_rows(tokens, num_packs=num_units, capacity_tokens=options.cutoff_len)
    write_rows(repeat_rows(rows, count), packed, **shape)
    return {False: plain, True: packed}


def _run_all(
    outcome: Outcome,
    chosen: list[tuple[Peer, Contender]],
    options: Namespace,
    data_dirs: dict[bool, Path],
) -> None:
    """Run every contender of one method, in turns; one that failed is not started again."""
    for number in range(options.repeats):
        for peer, contender in chosen:
            runs = outcome.runs.setdefault(contender.name, [])
            if runs and runs[-1].failure:
                continue
            environment = load_peers()[peer.environment or peer.name]
            task = Task(
                model=options.model,
                data_dir=data_dirs[contender.packing],
                method=outcome.method,
                template=options.template,
                steps=options.steps,
                batch_size=options.batch_size,
                cutoff_tokens=options.cutoff_len,
                learning_rate=_LEARNING_RATES[outcome.method],
                seed=options.seed,
            )
            launch = Launch(
                python=prepare_environment(environment, options.peers_dir),
                task=task,
                output_dir=options.work_dir / f"{outcome.method}-{_file_name(contender.name)}",
            )
            measured = run_contender(contender, launch, timeout_s=options.timeout)
            runs.append(measured)
            told = measured.failure or f"{measured.steps[-1].seconds:.2f} s for the last step"
            print(
                f"{outcome.method} {number + 1}/{options.repeats} {contender.name}: {told}, "
                f"{measured.wall_s:.0f} s in all",
                flush=True,
            )


def _report(
    outcome: Outcome,
    chosen: list[tuple[Peer, Contender]],
    options: Namespace,
    parameters: int,
) -> bool:
    """Print the tables of one method; tell whether our loss is near that of every peer."""
    figures = outcome.figures
    print(f"\n### {outcome.method}\n\n{formula(outcome.method, parameters)}\n")
    print(figures_table(figures, outcome.failures()))
    own = [c.name for peer, c in chosen if peer.name == OWN and c.name in figures]
    if own:
        print(f"\n{ratios_table(figures, own=own)}")
    alike = _alike(outcome, chosen)
    if OWN not in alike:
        return True
    print("", *agreement(alike, figures, reference=OWN), sep="\n")
    return all(loss_distance(figures[OWN], figures[name]) <= options.allowed_loss for name in alike)


def _alike(outcome: Outcome, chosen: list[tuple[Peer, Contender]]) -> dict[str, Measured]:
    """Return a run of each contender that trains the same rows in the same steps."""
    names = [contender.name for _, contender in chosen if not contender.packing]
    return {
        name: next(run for run in outcome.runs[name] if not run.failure)
        for name in names
        if name in outcome.figures
    }


def _save(options: Namespace, machine: Machine, outcomes: list[Outcome]) -> None:
    folder = options.save_dir
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S%z"),
        "command": " ".join(sys.argv),
        "machine": asdict(machine),
        "methods": {outcome.method: asdict(outcome) for outcome in outcomes},
    }
    text = json.dumps(values, indent=1, ensure_ascii=False)
    (folder / "compare_training.json").write_text(text + "\n", encoding="utf-8")
    all_peers = list(load_peers().values())
    for outcome in outcomes:
        chosen = select_contenders(all_peers, method=outcome.method, packing="both")
        present = [(peer, one) for peer, one in chosen if one.name in outcome.figures]
        path = folder / f"compare_training_{outcome.method}.png"
        title = f"{outcome.method}, {options.model.name}, {machine.processor}"
        plot(path, outcome.figures, _alike(outcome, present), title=title)
    print(f"\nWritten to {folder}")


def _machine_line(machine: Machine) -> str:
    return (
        f"{time.strftime('%Y-%m-%d')}, {machine.processor}, {machine.cores} cores, "
        f"{machine.memory_gb:.0f} GB, GEMM {machine.gemm_flops / 1e9:.0f} GFLOP/s with "
        f"{machine.gemm_threads} threads, load {machine.load:.1f} before"
    )


def _file_name(name: str) -> str:
    return "-".join(name.lower().replace(",", " ").replace("+", " ").split())


def _options() -> Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    whole: dict[str, Any] = {"type": int}
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument(
        "--data", type=Path, default=_DATA, help="alpaca rows (data/tcm_alpaca.json)"
    )
    parser.add_argument("--peers_dir", type=Path, default=default_peers_dir(), help="environments")
    parser.add_argument("--peers", default="llamafactory,trl,plain", help="may be empty")
    parser.add_argument("--methods", default="lora,full,qlora")
    parser.add_argument("--packing", choices=("off", "on", "both"), default="both")
    parser.add_argument("--only", default="", help="contenders whose name this pattern is in")
    parser.add_argument("--steps", default=12, help="optimizer steps (12)", **whole)
    parser.add_argument("--repeats", default=1, help="runs of each contender (1)", **whole)
    parser.add_argument("--batch_size", default=4, help="samples of a step (4)", **whole)
    parser.add_argument("--cutoff_len", default=512, help="longest sample in tokens", **whole)
    parser.add_argument("--seed", default=42, **whole)
    parser.add_argument("--template", default="deepseek", help="one that all write alike")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds for one run")
    parser.add_argument("--allowed_loss", type=float, default=0.02, help="relative distance (0.02)")
    parser.add_argument("--work_dir", type=Path, help="rows and logs (PEERS_DIR/runs)")
    parser.add_argument("--save_dir", type=Path, help="for compare_training.json and the plots")
    options = parser.parse_args()
    options.model = options.model.resolve()
    options.peers_dir = options.peers_dir.expanduser().resolve()
    options.work_dir = (options.work_dir or options.peers_dir / "runs").resolve()
    unknown = set(options.methods.split(",")) - set(_LEARNING_RATES)
    if unknown:
        parser.error(f"--methods: unknown {sorted(unknown)}; allowed: {sorted(_LEARNING_RATES)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
