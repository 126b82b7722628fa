"""What a run leaves behind for people and tools: metrics, `run.json`, curves, a model card."""

import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from llmtuner import __version__
from llmtuner.data.build import BuiltData
from llmtuner.extras.files import finite_or_null, read_json, write_json, write_text
from llmtuner.hparams.config import RunConfig
from llmtuner.train.output import RUN_FILE

EVAL_RUN_FILE = "eval_run.json"

_LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "deepspeed",
    "bitsandbytes",
    "sacrebleu",
    "rouge-score",
    "rjieba",
)


@dataclass(frozen=True)
class RunReport:
    """What a run did; `run.json` holds the same.

    Attributes:
        status: "running", "finished", or "tokenized" when only `tokenized_path` was written.
        run_id: the id in every checkpoint of the run.
        output_dir: where the results are.
        config: the resolved settings, without secrets.
        notices: derived and changed settings, each with its reason.
        data: counts per data set, with the files' hashes.
        audit: what is the matter with the rows, per data set; empty without an audit.
        contract: what was proved between training and serving; empty where there are no prompts.
        model: parameters, precision, attention.
        plan: what the run was foretold to need, and what it took.
        metrics: all results.
        versions: of Python and the libraries that were used.
        started: local time, ISO 8601.
        wall_time_s: seconds from start to end, by the monotonic clock.
    """

    status: str
    run_id: str
    output_dir: str
    config: Mapping[str, Any]
    notices: tuple[str, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    audit: Mapping[str, Any] = field(default_factory=dict)
    contract: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    plan: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    started: str = ""
    wall_time_s: float = 0.0

    def write(self) -> None:
        """Write `run.json`, or `eval_run.json` for a run that trains nothing.

        A later evaluation in the same folder must not replace the record of the training.
        """
        name = RUN_FILE if self.config["do_train"] else EVAL_RUN_FILE
        values = asdict(self) | {"metrics": finite_or_null(self.metrics)}
        write_json(Path(self.output_dir) / name, values)


def begin_report(config: RunConfig, *, run_id: str) -> RunReport:
    """Return the report of a run that starts now."""
    return RunReport(
        status="running",
        run_id=run_id,
        output_dir=str(config.train.output_dir),
        config=config.to_dict(),
        notices=config.notices,
        versions=library_versions(),
        started=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    )


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that are installed."""
    versions = {"llmtuner": __version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def write_results(output_dir: Path, name: str, metrics: Mapping[str, Any]) -> None:
    """Write `<name>_results.json` and join the numbers to `all_results.json`."""
    metrics = finite_or_null(metrics)
    write_json(output_dir / f"{name}_results.json", metrics)
    together = output_dir / "all_results.json"
    earlier = read_json(together) if together.is_file() else {}
    write_json(together, {**earlier, **metrics})


def write_model_card(report: RunReport) -> None:
    """Write a short `README.md` beside the weights: what was trained, on what, with what result."""
    config = report.config
    datasets = config.get("dataset") or []
    names = ", ".join(datasets) if isinstance(datasets, (list, tuple)) else str(datasets)
    results = [
        f"| {name} | {value:.4g} |"
        for name, value in report.metrics.items()
        if isinstance(value, (int, float)) and ("loss" in name or "perplexity" in name)
    ]
    rows = sum(counts.get("rows", 0) for counts in report.data.get("datasets", {}).values())
    base = config.get("model_name_or_path")
    lines = [
        "---",
        f"base_model: {base}",
        "library_name: " + ("peft" if config.get("finetuning_type") == "lora" else "transformers"),
        "tags: [llmtuner]",
        "---",
        "",
        f"# {Path(report.output_dir).name}",
        "",
        f"Tuned with llmtuner: stage `{config.get('stage')}`, method "
        f"`{config.get('finetuning_type')}`, base `{base}`.",
        "",
        f"Data: {names} ({rows} rows). Settings, file hashes, token counts and versions are in "
        "`run.json`.",
        "",
        *(["| metric | value |", "|-|-|", *results, ""] if results else []),
        "The model can be wrong: check what it says before you rely on it.",
        "",
    ]
    write_text(Path(report.output_dir) / "README.md", "\n".join(lines))


def tokenized_report(config: RunConfig, data: BuiltData) -> RunReport:
    """Return the report of a run that only wrote `tokenized_path`."""
    report = begin_report(config, run_id="")
    values = {**data.report, "saved_to": str(data.saved_to)}
    return replace(report, status="tokenized", data=values, audit=data.audit)
