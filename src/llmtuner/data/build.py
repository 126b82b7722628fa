"""From the user's data settings to the data sets of a run: the only way in.

files → conversations → tokens (stored by content) → mixed → split → packed
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, concatenate_datasets, interleave_datasets
from numpy.typing import NDArray

from llmtuner.data.audit.limits import Limits, parse_limits
from llmtuner.data.audit.report import audit_from_dict
from llmtuner.data.audit.training import Named, audit_run
from llmtuner.data.dataset_info import DatasetSpec, load_dataset_specs
from llmtuner.data.lengths import sample_lengths
from llmtuner.data.packing import fill_ratio, pack
from llmtuner.data.stored_column import stored_column
from llmtuner.data.stream import SampleStream, held_out_samples
from llmtuner.data.tokenise import Encoder, tokenise
from llmtuner.data.tokenized import is_of_this_job, load_tokenized, save_tokenized, settings_of
from llmtuner.extras.errors import DataError
from llmtuner.extras.logs import get_logger
from llmtuner.hparams.audit import AuditArgs
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
        audit: what is the matter with the rows, for `run.json`; empty without an audit.
        saved_to: where `tokenized_path` was written; the run ends there.
    """

    train: Dataset | SampleStream | None
    evals: Mapping[str, Dataset]
    packs: list[list[int]] | None
    report: Mapping[str, Any]
    audit: Mapping[str, Any] = field(default_factory=dict)
    saved_to: Path | None = None


def build_datasets(
    args: DataArgs,
    *,
    encode: Encoder,
    seed: int,
    packing: bool,
    for_training: bool,
    audit: AuditArgs | None = None,
) -> BuiltData:
    """Read, tokenise, audit, mix, split and pack.

    Args:
        args: the data settings.
        encode: makes samples of a conversation.
        seed: decides the split, the mixture and the packs.
        packing: put several samples into one unit of `cutoff_len` tokens.
        for_training: False gives everything to evaluation.
        audit: whether to audit, and what stops the run; None is no audit.

    Raises:
        DataError: a file or row cannot be used, nothing is left to train on, or the audit found
            more than its limits allow.
        ConfigError: a limit of the audit is not one.
    """
    limits = parse_limits(audit.audit_limits) if audit is not None and audit.audit else None
    if args.streaming and for_training:
        return _build_stream(args, encode=encode, seed=seed, packing=packing, limits=limits)
    target = Path(args.tokenized_path) if args.tokenized_path else None
    if target is not None and target.exists() and not is_of_this_job(target):
        parts, report = load_tokenized(target, settings_of(args, encode, seed))
        audited = _told(report.pop("audit", None), limits)
    else:
        parts, report = _tokenise_all(
            args, encode=encode, seed=seed, for_training=for_training, limits=limits
        )
        audited = _told(report.get("audit"), limits)
        if target is not None:
            settings = settings_of(args, encode, seed)
            save_tokenized(target, parts, settings=settings, report=report)
            report.pop("audit", None)
            return BuiltData(None, {}, None, report, audited, saved_to=target)
        report.pop("audit", None)
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
        lengths = sample_lengths(train)
        packs = pack(lengths, capacity=args.cutoff_len, seed=seed)
        filled = fill_ratio(packs, lengths, capacity=args.cutoff_len)
        logger.info(
            "Packed %d samples into %d packs, %.2f %% full.", len(lengths), len(packs), 100 * filled
        )
        report = {**report, "packs": len(packs), "pack_fill_ratio": round(filled, 5)}
    return BuiltData(train, evals, packs, report, audited)


def _told(values: Mapping[str, Any] | None, limits: Limits | None) -> Mapping[str, Any]:
    """Log an audit and hold it against the limits; nothing where there is none."""
    if values is None or limits is None:
        return {}
    audit = audit_from_dict(values, limits)
    audit.log()
    audit.check()
    return audit.to_dict()


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


def _build_stream(
    args: DataArgs, *, encode: Encoder, seed: int, packing: bool, limits: Limits | None
) -> BuiltData:
    """Return a training stream; validation rows come from the head, or from `eval_dataset`."""
    specs = load_dataset_specs(args, args.dataset or ())
    eval_specs = load_dataset_specs(args, args.eval_dataset or ())
    num_held_out = 0 if eval_specs else int(args.val_size)
    evals = {}
    audited: dict[str, Any] = {}
    if eval_specs:
        sets = _tokenise_named(eval_specs, args, encode=encode, with_audit=limits is not None)
        evals[""] = concatenate_datasets([tokens.dataset for _, tokens in sets])
        if limits is not None:
            found = audit_run((), sets, parts=evals, args=args, limits=limits)
            audited |= _told(found.to_dict(), limits)
    elif num_held_out:
        evals[""] = held_out_samples(specs, args, encode=encode, num_rows=num_held_out)
    _check_not_empty(None, evals, {})
    stream = SampleStream(
        specs, args, encode=encode, seed=seed, packing=packing, num_held_out=num_held_out
    )
    logger.info("Streaming %s; counts are not known before the end.", ", ".join(args.dataset or ()))
    report = {"streaming": True, "held_out_rows": num_held_out, "datasets": stream.counts}
    if limits is not None:
        logger.info("Audit: streamed rows are counted while training, and not looked at.")
        audited["streaming"] = "training rows are counted (see data), and not looked at"
    return BuiltData(stream, evals, None, report, audited)


def _tokenise_all(
    args: DataArgs, *, encode: Encoder, seed: int, for_training: bool, limits: Limits | None
) -> tuple[dict[str, Dataset], dict[str, Any]]:
    specs = load_dataset_specs(args, args.dataset or ())
    eval_specs = load_dataset_specs(args, args.eval_dataset or ())
    with_audit = limits is not None
    sets = _tokenise_named(specs, args, encode=encode, with_audit=with_audit)
    eval_sets = _tokenise_named(eval_specs, args, encode=encode, with_audit=with_audit)
    parts: dict[str, Dataset] = {}
    if sets:
        mixed = _mix([tokens.dataset for _, tokens in sets], args, seed=seed)
        if not for_training and not eval_sets:
            parts["validation"] = mixed
        elif not for_training:
            pass
        elif args.val_size and not eval_sets:
            parts["train"], parts["validation"] = split_rows(
                mixed, args.val_size, seed=seed, is_one_set=len(sets) == 1
            )
        else:
            parts["train"] = mixed
    if eval_sets and args.eval_on_each_dataset:
        parts |= {f"validation_{spec.name}": tokens.dataset for spec, tokens in eval_sets}
    elif eval_sets:
        parts["validation"] = concatenate_datasets([tokens.dataset for _, tokens in eval_sets])
    samples = {name: len(part) for name, part in parts.items()}
    report: dict[str, Any] = {"datasets": {}, "samples": samples}
    if limits is not None:
        found = audit_run(sets, eval_sets, parts=parts, args=args, limits=limits)
        report["audit"] = found.to_dict()
    for spec, tokens in [*sets, *eval_sets]:
        counts = {name: value for name, value in tokens.counts.items() if name != "audit"}
        report["datasets"][spec.name] = counts
    return parts, report


def _tokenise_named(
    specs: Sequence[DatasetSpec], args: DataArgs, *, encode: Encoder, with_audit: bool
) -> list[Named]:
    """Tokenise the sets in their order; a set that is named twice counts twice."""
    return [(spec, tokenise(spec, args, encode, with_audit=with_audit)) for spec in specs]


def _mix(sets: Sequence[Dataset], args: DataArgs, *, seed: int) -> Dataset:
    """Join the sets by `mix_strategy`."""
    if len(sets) == 1 or args.mix_strategy == "concat":
        return concatenate_datasets(list(sets))
    stop = "first_exhausted" if args.mix_strategy == "interleave_under" else "all_exhausted"
    chances = list(args.interleave_probs) if args.interleave_probs else None
    return interleave_datasets(list(sets), probabilities=chances, seed=seed, stopping_strategy=stop)


def split_rows(
    dataset: Dataset, val_size: float, *, seed: int, is_one_set: bool = False
) -> tuple[Dataset, Dataset]:
    """Hold out whole data rows for validation; both parts keep the file order.

    Args:
        dataset: samples; those of one row (same `source`) stay together.
        val_size: a share below 1, or a number of rows from 1 up.
        seed: decides which rows.
        is_one_set: the samples are those of one data set, in their order.

    Raises:
        DataError: nothing would be left to train on.
    """
    number_of = _row_numbers(dataset, is_one_set=is_one_set)
    num_rows = int(number_of.max(initial=-1)) + 1
    wanted = int(val_size) if val_size >= 1 else max(1, int(num_rows * val_size))
    if wanted >= num_rows:
        raise DataError(
            "The validation split would take every row.",
            got=f"val_size={val_size:g} of {num_rows} rows",
            allowed="a share below 1, or fewer rows than there are",
        )
    is_chosen = np.zeros(num_rows, bool)
    is_chosen[np.random.default_rng(seed).permutation(num_rows)[:wanted]] = True
    is_held_out = is_chosen[number_of]
    logger.info("Held out %d of %d rows for validation (seed %d).", wanted, num_rows, seed)
    train, validation = np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)
    return dataset.select(train), dataset.select(validation)


def _row_numbers(dataset: Dataset, *, is_one_set: bool) -> NDArray[np.int64]:
    """Return, for each sample, the number of its data row, in the order of their first samples."""
    places = stored_column(dataset, "source")
    if is_one_set:  # the samples of a row stand side by side
        is_next = np.zeros(len(places), bool)
        is_next[1:] = pc.not_equal(places[1:], places[:-1])
        return np.cumsum(is_next)
    # a million names as Python texts would take a minute and much memory: numbers stand for them
    parts = places.dictionary_encode().chunks
    return np.concatenate([np.zeros(0, np.int64), *(np.asarray(part.indices) for part in parts)])
