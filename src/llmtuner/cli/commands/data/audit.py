"""Look at every row for what damages training: cut, empty, repeated, leaked, unproved rows."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmtuner.cli.options import parse_or_help
from llmtuner.extras.errors import ConfigError, StorageError
from llmtuner.extras.files import write_json, write_text
from llmtuner.extras.logs import get_logger

if TYPE_CHECKING:
    from llmtuner.data.audit.report import Audit
    from llmtuner.data.token_view import SampleView

logger = get_logger(__name__)

_NUM_VIEWS = 12


def run(argv: Sequence[str]) -> int:
    """Audit the data sets; only the tokenizer is loaded.

    Raises:
        ConfigError: a limit names no defect, or there is no data set.
        DataError: more rows than allowed have a defect, or a set cannot be read.
    """
    config = parse_or_help("data audit", argv)
    if config is None:
        return 0
    from llmtuner.cli.audit_print import print_audit
    from llmtuner.data.audit.collect import audit_datasets
    from llmtuner.data.audit.limits import parse_limits
    from llmtuner.data.audit.samples import sample_views
    from llmtuner.data.encoders import ENCODERS
    from llmtuner.model.tokenizer import load_tokenizer

    limits = parse_limits(config.audit.audit_limits)
    if not (config.data.dataset or config.data.eval_dataset):
        raise ConfigError("There is no data set to audit.", where="--dataset", fix="name one")
    tokenizer = load_tokenizer(config.model, without_model=True)
    encode = ENCODERS.get(config.finetuning.stage)(config.data, tokenizer)
    audit = audit_datasets(config.data, encode, limits=limits)
    if config.showing.json:
        print(json.dumps(audit.to_dict(), ensure_ascii=False, allow_nan=False))
    else:
        print_audit(audit)
    if config.showing.report_dir is not None:
        views = sample_views(audit, config.data, encode, most=_NUM_VIEWS)
        _write_report(Path(config.showing.report_dir), audit, views)
    audit.check()
    return 0


def _write_report(folder: Path, audit: "Audit", views: "Sequence[SampleView]") -> None:
    from llmtuner.data.audit.samples import page_values
    from llmtuner.data.page import render_page

    title = "Data audit · 数据审计: " + ", ".join(audit.sets)
    try:
        write_json(folder / "audit.json", audit.to_dict())
        write_text(folder / "audit.html", render_page(title, page_values(audit), views))
    except OSError as error:
        raise StorageError(
            f"The report cannot be written: {error.strerror}.",
            where=f"--report_dir {folder}",
            fix="choose a folder that you may write to",
        ) from error
    logger.info("Report: %s and audit.html beside it.", folder / "audit.json")
