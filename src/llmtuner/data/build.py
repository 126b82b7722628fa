"""From the user's data settings to the data sets of a run: the only way in.

files → conversations → tokens (stored by content) → mixed → split → packed
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets, interleave_datasets

from llmtuner.data.dataset_info import load_dataset_specs
from llmtuner.data.packing import fill_ratio, pack
from llmtuner.data.stream import SampleStream, held_out_samples
from llmtuner.data.token_store import Tokens
from llmtuner.data.tokenise import Encoder, tokenise
from llmtuner.data.tokenized import is_of_this_job, load_tokenized, save_tokenized, settings_of
from llmtuner.extras.errors import DataError
from llmtuner.extras.logs import get_logger
from llmtuner.hparams.data import DataArgs

logger = get_logger(__name__)


@dataclass(frozen=True)
class BuiltData:
    """The data sets of a run.

    Attributes:
        train: samples to learn, in file order; None when the run does not train.
        evals: named evaluation sets; the name "" is the split or the only `eval_dataset`.
        packs: sample numbers of `train` that share a unit; None without packing.
        report: counts per data set, for `run.json`.
        saved_to: where `tokenized_path` was written; the run ends there.
    """

    train: Dataset | SampleStream | None
    evals: Mapping[str, Dataset]
    packs: list[list[int]] | None
    report: Mapping[str, Any]
    saved_to: Path | None = None


def build_datasets(
    args: DataArgs, *, encode: Encoder, seed: int, packing: bool, for_training: bool
) -> BuiltData:
    """Read, tokenise, mix, split and pack.

    Args:
        args: the data settings.
        encode: makes samples of a conversation.
        seed: decides the split, the mixture and the packs.
        packing: put several samples into one unit of `cutoff_len` tokens.
        for_training: False gives everything to evaluation.

    Raises:
        DataError: a file or row cannot be used, or nothing is left to train on.
    """
    if args.streaming and for_training:
        return _build_stream(args, encode=encode, seed=seed, packing=packing)
    target = Path(args.tokenized_path) if args.tokenized_path else None
    if target is not None and target.exists() and not is_of_this_job(target):
        parts, report = load_tokenized(target, settings_of(args, encode, seed))
    else:
        parts, report = _tokenise_all(args, encode=encode, seed=seed, for_training=for_training)
        if target is not None:
            settings = settings_of(args, encode, seed)
            save_tokenized(target, parts, settings=settings, report=report)
            return BuiltData(None, {}, None, report, saved_to=target)
    train = parts.pop("train", None)
    if for_training and train is None:
        raise DataError(
            "There is no training set.",
            where=str(target or args.dataset),
            fix="name one with --dataset, or tokenise again with --do_train",
        )
    evals = {
        name.removeprefix("validation").removeprefix("_"): part for name, part in parts.items()
    }
    _check_not_empty(train, evals, report)
    packs = None
    if packing and train is not None:
        lengths = [len(ids) for ids in train["input_ids"]]
        packs = pack(lengths, capacity=args.cutoff_len, seed=seed)
        filled = fill_ratio(packs, lengths, capacity=args.cutoff_len)
        logger.info(
            "Packed %d samples into %d packs, %.2f %% full.", len(lengths), len(packs), 100 * filled
        )
        report = {**report, "packs": len(packs), "pack_fill_ratio": round(filled, 5)}
    return BuiltData(train, evals, packs, report)


def _check_not_empty(
    train: Dataset | None, evals: Mapping[str, Dataset], report: Mapping[str, Any]
) -> None:
    named = {f"evaluation set {name}".rstrip(): part for name, part in evals.items()}
    if train is not None:
        named["training set"] = train
    for name, part in named.items():
        if len(part) == 0:
            raise DataError(
                f"The {name} has no usable row.",
                got={
                    name: f"{counts['rows_left_out']} of {counts['rows']} rows left out"
                    for name, counts in report.get("datasets", {}).items()
                },
                fix="raise --cutoff_len if the rows are too long for it, or use other data",
            )


def _build_stream(args: DataArgs, *, encode: Encoder, seed: int, packing: bool) -> BuiltData:
    """Return a training stream; validation rows come from the head, or from `eval_dataset`."""
    specs = load_dataset_specs(args, args.dataset or ())
    eval_specs = load_dataset_specs(args, args.eval_dataset or ())
    num_held_out = 0 if eval_specs else int(args.val_size)
    evals = {}
    if eval_specs:
        sets = [tokenise(spec, args, encode).dataset for spec in eval_specs]
        evals[""] = concatenate_datasets(sets)
    elif num_held_out:
        evals[""] = held_out_samples(specs, args, encode=encode, num_rows=num_held_out)
    _check_not_empty(None, evals, {})
    stream = SampleStream(
        specs, args, encode=encode, seed=seed, packing=packing, num_held_out=num_held_out
    )
    logger.info("Streaming %s; counts are not known before the end.", ", ".join(args.dataset or ()))
    report = {"streaming": True, "held_out_rows": num_held_out, "datasets": stream.counts}
    return BuiltData(stream, evals, None, report)


def _tokenise_all(
    args: DataArgs, *, encode: Encoder, seed: int, for_training: bool
) -> tuple[dict[str, Dataset], dict[str, Any]]:
    sets = _tokenise_named(args, args.dataset or (), encode=encode)
    eval_sets = _tokenise_named(args, args.eval_dataset or (), encode=encode)
    parts: dict[str, Dataset] = {}
    if sets:
        mixed = _mix([tokens.dataset for _, tokens in sets], args, seed=seed)
        if not for_training and not eval_sets:
            parts["validation"] = mixed
        elif not for_training:
            pass
        elif args.val_size and not eval_sets:
            parts["train"], parts["validation"] = split_rows(mixed, args.val_size, seed=seed)
        else:
            parts["train"] = mixed
    if eval_sets and args.eval_on_each_dataset:
        parts |= {f"validation_{name}": tokens.dataset for name, tokens in eval_sets}
    elif eval_sets:
        parts["validation"] = concatenate_datasets([tokens.dataset for _, tokens in eval_sets])
    counts = {name: tokens.counts for name, tokens in [*sets, *eval_sets]}
    samples = {name: len(part) for name, part in parts.items()}
    return parts, {"datasets": counts, "samples": samples}


def _tokenise_named(
    args: DataArgs, names: Sequence[str], *, encode: Encoder
) -> list[tuple[str, Tokens]]:
    """Tokenise the sets in their order; a set that is named twice counts twice."""
    specs = load_dataset_specs(args, names)
    return [(spec.name, tokenise(spec, args, encode)) for spec in specs]


def _mix(sets: Sequence[Dataset], args: DataArgs, *, seed: int) -> Dataset:
    """Join the sets by `mix_strategy`."""
    if len(sets) == 1 or args.mix_strategy == "concat":
        return concatenate_datasets(list(sets))
    stop = "first_exhausted" if args.mix_strategy == "interleave_under" else "all_exhausted"
    chances = list(args.interleave_probs) if args.interleave_probs else None
    return interleave_datasets(list(sets), probabilities=chances, seed=seed, stopping_strategy=stop)


def split_rows(dataset: Dataset, val_size: float, *, seed: int) -> tuple[Dataset, Dataset]:
    """Hold out whole data rows for validation; both parts keep the file order.

    Args:
        dataset: samples; those of one row (same `source`) stay together.
        val_size: a share below 1, or a number of rows from 1 up.
        seed: decides which rows.

    Raises:
        DataError: nothing would be left to train on.
    """
    sources = dataset["source"]
    rows = list(dict.fromkeys(sources))
    wanted = int(val_size) if val_size >= 1 else max(1, int(len(rows) * val_size))
    if wanted >= len(rows):
        raise DataError(
            "The validation split would take every row.",
            got=f"val_size={val_size:g} of {len(rows)} rows",
            allowed="a share below 1, or fewer rows than there are",
        )
    chosen = np.random.default_rng(seed).permutation(len(rows))[:wanted]
    held_out = {rows[number] for number in chosen}
    is_held_out = np.array([source in held_out for source in sources])
    logger.info("Held out %d of %d rows for validation (seed %d).", wanted, len(rows), seed)
    train, validation = np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)
    return dataset.select(train), dataset.select(validation)
