"""One row of the data sets by its number, counting the rows that cannot be used too."""

from collections.abc import Sequence
from dataclasses import replace

from llmtuner.data.conversation import Conversation
from llmtuner.data.dataset_info import DatasetSpec, load_dataset_specs
from llmtuner.data.records import BadRows
from llmtuner.data.rows import load_conversations
from llmtuner.extras.errors import DataError
from llmtuner.hparams.data import DataArgs


def pick_row(args: DataArgs, names: Sequence[str], number: int) -> Conversation:
    """Return row `number` of the data sets, counted from 0 through all of them in their order.

    Rows are counted as they stand in the files: `num_samples`, `max_samples` and `on_bad_row`
    change nothing, so that a number always means the same row.

    Raises:
        DataError: the row cannot be used, or there are fewer rows.
    """
    args = replace(args, max_samples=None, on_bad_row="skip", max_bad_rows=1.0)
    before = 0
    counts: dict[str, int] = {}
    for spec in load_dataset_specs(args, names):
        found, counts[spec.name] = _look(replace(spec, num_samples=None), args, number - before)
        if found is not None:
            return found
        before += counts[spec.name]
    raise DataError(
        f"There is no row {number}: the data has {before} rows.",
        got={"row": number, "rows": counts},
        allowed=f"0 to {before - 1}" if before else "none, the data is empty",
        fix="choose another --row",
    )


def _look(spec: DatasetSpec, args: DataArgs, number: int) -> tuple[Conversation | None, int]:
    """Return the row, or None and the number of rows of the set."""
    num_rows = 0

    def count_bad(error: DataError) -> None:
        nonlocal num_rows
        if num_rows == number:
            raise error
        num_rows += 1

    bad_rows = BadRows(args.on_bad_row, on_bad=count_bad)
    try:
        for conversation in load_conversations(spec, data_args=args, bad_rows=bad_rows):
            if num_rows == number:
                return conversation, num_rows
            num_rows += 1
    except DataError as error:
        # All rows were bad, and another one was asked for.
        if error.kind != "no_usable_rows" or not num_rows:
            raise
    return None, num_rows
