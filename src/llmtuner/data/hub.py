"""Rows of data sets on a hub, through the hub's own library."""

from collections.abc import Iterator
from typing import Any

from llmtuner.data.dataset_info import HubSource
from llmtuner.data.records import Row
from llmtuner.extras.errors import DataError, MissingExtraError


def read_hub_rows(source: HubSource, *, streaming: bool) -> Iterator[Row]:
    """Yield the rows of one split; `where` is `name#row`, with rows counted from 0.

    Raises:
        DataError: the data set cannot be loaded, one line says why.
    """
    try:
        rows = _load(source, streaming=streaming)
        for number, row in enumerate(rows):
            yield Row(dict(row), f"{source.repo_id}#{number}")
    except (DataError, MissingExtraError):
        raise
    except Exception as error:  # every library below has its own errors
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        hub = "Hugging Face" if source.hub == "hf" else "ModelScope"
        raise DataError(
            f"The data set cannot be loaded from the {hub} hub: {reason}",
            where=source.repo_id,
            fix="check the network and the name; or download the files and give their path",
            kind="hub_failure",
        ) from error


def _load(source: HubSource, *, streaming: bool) -> Any:
    if source.hub == "ms":
        try:
            from modelscope import MsDataset
        except ImportError:
            raise MissingExtraError(
                "modelscope", extra="modelscope", needed_for="Data from the ModelScope hub"
            ) from None
        return MsDataset.load(
            source.repo_id,
            subset_name=source.subset or "default",
            data_dir=source.folder,
            split=source.split,
            use_streaming=streaming,
        )
    from datasets import load_dataset

    return load_dataset(
        source.repo_id,
        name=source.subset,
        data_dir=source.folder,
        split=source.split,
        streaming=streaming,
    )
