"""One column of stored samples as Arrow has it: no row becomes a Python object."""

import pyarrow as pa
from datasets import Dataset


def stored_column(dataset: Dataset, name: str) -> pa.ChunkedArray:
    """Return the values of a column, in the order of the samples.

    A part of a set is taken out of the whole at once; `datasets` itself gathers it row by row, and
    has no public name for which rows these are.
    """
    values: pa.ChunkedArray = dataset.data.column(name)
    chosen = dataset._indices
    return values if chosen is None else values.take(chosen.column(0))
