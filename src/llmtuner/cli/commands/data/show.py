"""Show one row token by token: what the model reads and what it learns."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmtuner.cli.options import parse_or_help
from llmtuner.extras.errors import StorageError
from llmtuner.extras.files import write_text
from llmtuner.extras.logs import get_logger

if TYPE_CHECKING:
    from llmtuner.data.token_view import SampleView

logger = get_logger(__name__)


def run(argv: Sequence[str]) -> int:
    """Show one row in the terminal, as JSON, or on a page; only the tokenizer is loaded.

    Raises:
        DataError: there is no such row, or it cannot be used.
    """
    config = parse_or_help("data show", argv)
    if config is None:
        return 0
    from llmtuner.cli.token_print import print_row
    from llmtuner.data.encoders import ENCODERS
    from llmtuner.data.pick_row import pick_row
    from llmtuner.data.token_view import row_report, token_view
    from llmtuner.model.tokenizer import load_tokenizer

    names = [*(config.data.dataset or ()), *(config.data.eval_dataset or ())]
    number = config.showing.row
    conversation = pick_row(config.data, names, number)
    tokenizer = load_tokenizer(config.model, without_model=True)
    encode = ENCODERS.get(config.finetuning.stage)(config.data, tokenizer)
    (encoded,) = encode([conversation])
    views = token_view(encoded, tokenizer)
    template = config.data.template if encode.template is not None else None
    report = row_report(encoded, tokenizer, template=template)
    if config.showing.json:
        print(json.dumps(report, ensure_ascii=False, allow_nan=False))
    else:
        print_row(report, views)
    if config.showing.report_dir is not None:
        path = Path(config.showing.report_dir) / f"row-{number}.html"
        _write_page(path, f"{encoded.source} · row {number}", report, views)
    return 0


def _write_page(
    path: Path, title: str, report: dict[str, object], views: "Sequence[SampleView]"
) -> None:
    from llmtuner.data.page import render_page

    summary = {name: value for name, value in report.items() if isinstance(value, str | int | None)}
    summary.pop("text")
    try:
        write_text(path, render_page(title, {"row": summary}, views))
    except OSError as error:
        raise StorageError(
            f"The page cannot be written: {error.strerror}.",
            where=f"--report_dir {path.parent}",
            fix="choose a folder that you may write to",
        ) from error
    logger.info("Page: %s", path)
