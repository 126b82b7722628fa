"""Counts what ranks really send and keep under DeepSpeed ZeRO, beside the formulas.

Every collective of torch.distributed is counted in the processes themselves (1, 2 and 4 on this
machine, over gloo), with a small random Llama in bf16. Time is not measured: processes that share
one machine say nothing about a network.

    python benchmarks/scale.py
    python benchmarks/scale.py --ranks 1 2 --accumulation 4 --output scale.json
"""

import argparse
import json
import os
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import spawn
from transformers import LlamaConfig, LlamaForCausalLM

from llmtuner.extras.env import become_process
from llmtuner.train.scale import Model, Traffic, kept_bytes, saved_bytes, traffic

HIDDEN, PERSISTENT = 64, 640  # transformers sets the second to ten times the first
STAGES = (0, 1, 2, 3)
WHOLE = {  # method of a process group -> kind, and which argument is whole
    "allreduce": ("all_reduced", 0),
    "allreduce_coalesced": ("all_reduced", 0),
    "allgather": ("gathered", 0),
    "allgather_coalesced": ("gathered", 0),
    "all_gather_single": ("gathered", 0),
    "all_gather_single_coalesced": ("gathered", 0),
    "reduce_scatter": ("scattered", 1),
    "reduce_scatter_single": ("scattered", 1),
    "reduce_scatter_single_coalesced": ("scattered", 1),
    "reduce": ("reduced", 0),
    "broadcast": ("broadcast", 0),
}


def main() -> None:
    """Run every number of ranks, print the table, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--accumulation", type=int, default=2, help="micro-batches of a step")
    parser.add_argument("--output", type=Path, help="where to write the figures as JSON")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print("ZeRO  ranks  all-reduced  gathered  scattered", end="  ")
    print("sent by a rank   weights  gradients  optimizer")
    for ranks in args.ranks:
        with tempfile.TemporaryDirectory() as folder:
            spawn(_work, (ranks, args.accumulation, folder), nprocs=ranks)
            found = json.loads(Path(folder, "rows.json").read_text())
        print("\n".join(line for row in found for line in _lines(row)), flush=True)
        rows += found
    if args.output is not None:
        args.output.write_text(json.dumps(rows, indent=2) + "\n")


def _work(rank: int, ranks: int, accumulation: int, folder: str) -> None:
    become_process(rank, world_size=ranks, num_threads=1)
    torch.set_num_threads(1)
    import deepspeed

    backend: Any = import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None  # for inference only, and a minute of compiling
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    rows = [_measure(stage, ranks, accumulation, Path(folder)) for stage in STAGES]
    if rank == 0:
        Path(folder, "rows.json").write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()
    # Everything is measured and written. What libraries do at the end of a process now and then
    # aborts it ("terminate called without an active exception": a thread that nobody waits for).
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _measure(stage: int, ranks: int, accumulation: int, folder: Path) -> dict[str, Any]:
    """Return formula and measurement of one ZeRO stage, on this rank."""
    import deepspeed

    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": stage,
            # what large models do by themselves: weights go as soon as their layer is done
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 0,
            "stage3_param_persistence_threshold": PERSISTENT,
        },
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(_llama())
    sizes = tuple(parameter.numel() for parameter in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    tokens = torch.arange(16).reshape(1, 16)
    counts: Counter[str] = Counter()
    gradients = None
    for step in range(2):  # the first one makes the optimizer's state
        with _counted(counts if step else Counter()):
            for number in range(accumulation):
                engine.backward(engine(input_ids=tokens, labels=tokens).loss)
                if number < accumulation - 1:  # they stay until the next pass adds to them
                    gradients = _bytes(_gradients(engine, stage))
                engine.step()
    shape = Model(sizes, weight_bytes=2, gradient_bytes=2, state_bytes=12)
    formula = traffic(
        shape, stage=stage, ranks=ranks, passes=accumulation, persistent_below=PERSISTENT
    )
    engine.save_checkpoint(str(folder / str(stage)), tag="saved")
    dist.barrier()
    files = {path.name: path.stat().st_size for path in folder.glob(f"{stage}/saved/*")}
    saved = saved_bytes(shape, stage=stage, ranks=ranks)
    seen = Traffic(counts["all_reduced"], counts["gathered"], counts["scattered"])
    kept = kept_bytes(shape, stage=stage, ranks=ranks)
    row = {
        "stage": stage,
        "ranks": ranks,
        "formula": formula.to_dict(ranks),
        "measured": seen.to_dict(ranks),
        "others": {name: counts[name] for name in ("reduced", "broadcast")},
        "formula_kept": vars(kept),
        "measured_kept": {**_kept(engine, stage), "gradients": gradients},
        "formula_saved": {"per_rank": saved.per_rank, "by_first": saved.by_first},
        "measured_saved": files,
    }
    engine.destroy()
    return row


def _kept(engine: Any, stage: int) -> dict[str, int]:
    """Return the bytes of weights, and of the optimizer with its float32 weights, of this rank."""
    zero = engine.optimizer
    parameters = list(engine.module.parameters())
    if stage == 3:
        weights = [parameter.ds_tensor for parameter in parameters]
        masters = zero.fp32_partitioned_groups_flat
    elif stage:
        weights = parameters
        masters = zero.single_partition_of_fp32_groups
    else:
        weights = parameters
        masters = zero.fp32_groups
    inner = zero.optimizer
    states = [
        tensor
        for state in inner.state.values()
        for tensor in state.values()
        if isinstance(tensor, torch.Tensor) and tensor.numel() > 1
    ]
    return {"weights": _bytes(weights), "optimizer": _bytes([*masters, *states])}


def _gradients(engine: Any, stage: int) -> Any:
    """Return the gradients that this rank holds between two passes."""
    if stage == 3:
        return engine.optimizer.grad_partitions_flat_buffer
    if stage == 2:
        return list(engine.optimizer.all_grad_tensors.values())
    return [parameter.grad for parameter in engine.module.parameters()]


def _bytes(tensors: Any) -> int:
    if isinstance(tensors, torch.Tensor):
        return int(tensors.numel() * tensors.element_size())
    return sum(_bytes(tensor) for tensor in tensors)


@contextmanager
def _counted(counts: Counter[str]) -> Iterator[None]:
    """Count the bytes of every collective meanwhile; of each the whole, as over all ranks."""
    owner = dist.ProcessGroup
    before = {name: vars(owner)[name] for name in WHOLE}

    def watch(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        kind, place = WHOLE[name]

        def watched(group: Any, *args: Any, **kwargs: Any) -> Any:
            counts[kind] += _bytes(args[place])
            return run(group, *args, **kwargs)

        return watched

    for name in WHOLE:
        setattr(owner, name, watch(name, getattr(owner, name)))
    try:
        yield
    finally:
        for name, run in before.items():
            setattr(owner, name, run)


def _llama() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=500, hidden_size=HIDDEN, intermediate_size=101, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip


def _lines(row: dict[str, Any]) -> Iterator[str]:
    for label in ("formula", "measured"):
        found, kept = row[label], row[f"{label}_kept"]
        yield (
            f"{row['stage']:>4}  {row['ranks']:>5}  {found['all_reduced']:>11,.0f}"
            f"{found['gathered']:>10,.0f} {found['scattered']:>10,.0f} {found['sent']:>15,.0f}"
            f"{kept['weights']:>10,.0f} {kept['gradients'] or 0:>10,.0f}"
            f"{kept['optimizer']:>11,.0f}  {label}"
        )


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


if __name__ == "__main__":
    main()
