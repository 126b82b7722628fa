"""Show what a model is made of, and which of its layers LoRA should sit on."""

import json
from argparse import ArgumentParser
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmtuner.hparams.model import ModelArgs

if TYPE_CHECKING:
    from llmtuner.model.structure import ModelStructure

_WIDTH = 130


def run(argv: Sequence[str]) -> int:
    """Read the model's configuration and print its structure; no weights are needed."""
    parser = ArgumentParser(prog="llmtuner targets", description=__doc__)
    parser.add_argument("model", help="folder with a config.json, or a model of the hub")
    parser.add_argument("--lora_rank", type=int, default=8, help="rank to count with (8)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run Python code that comes with the model"
    )
    args = parser.parse_args(argv)
    if args.lora_rank < 1:
        parser.error("--lora_rank must be at least 1")
    from llmtuner.model.structure import read_structure

    model = ModelArgs(model_name_or_path=args.model, trust_remote_code=args.trust_remote_code)
    structure = read_structure(model, lora_rank=args.lora_rank)
    if args.json:
        print(json.dumps(structure.to_dict(), ensure_ascii=False))
    else:
        _print_structure(structure)
    return 0


def _print_structure(structure: "ModelStructure") -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.ROUNDED)
    for heading in ("module", "class", "weight", "role", "count", "parameters", "target"):
        is_number = heading in ("count", "parameters")
        table.add_column(heading, justify="right" if is_number else "left", no_wrap=True)
    for kind in structure.kinds:
        row = (kind.name, kind.type, kind.shape, kind.role, f"{kind.count:,}")
        table.add_row(*row, f"{kind.parameters:,}", "yes" if kind.is_target else "")
    console = Console(markup=False, highlight=False)
    console.width = max(console.width, _WIDTH)  # names are for copying: they are never shortened
    tied = ", head and embedding share their weights" if structure.is_tied else ""
    total = f"{structure.layers} layers, {structure.parameters:,} parameters{tied}"
    console.print(f"{structure.architecture}: {total}", soft_wrap=True)
    console.print(table)
    for note in structure.notes:
        console.print(note, soft_wrap=True)
    share = 100 * structure.lora_parameters / max(structure.parameters, 1)
    console.print(
        f"LoRA of rank {structure.lora_rank} on them trains {structure.lora_parameters:,} "
        f"parameters ({share:.3g} %).",
        soft_wrap=True,
    )
    console.print(f"--lora_target {','.join(structure.targets)}", soft_wrap=True)
