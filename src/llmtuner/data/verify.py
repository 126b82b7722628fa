"""The contract between training and serving, checked from the serving side.

Encoding proves its spans on rendered text. Here nothing of that is used: the tokenizer is saved and
loaded again, as it will lie beside the weights, and transformers' own `apply_chat_template` says
what serving sends. For every trained answer, (a) the ids before it are these ids, (b) its last id
is one that serving stops on, and no earlier one is, and (c) exactly the answers carry labels.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llmtuner.data.conversation import IGNORE_INDEX, Conversation
from llmtuner.data.dataset_info import load_dataset_specs
from llmtuner.data.drafts import Draft, Span
from llmtuner.data.encoders.sft import ConversationEncoder
from llmtuner.data.prompt import unguarded
from llmtuner.data.records import BadRows
from llmtuner.data.render import Encoded, Sample
from llmtuner.data.rows import load_conversations
from llmtuner.data.template import Template
from llmtuner.data.tokenizer_digest import tokenizer_digest
from llmtuner.extras.errors import DataError, TemplateError
from llmtuner.extras.logs import get_logger
from llmtuner.hparams.data import DataArgs

logger = get_logger(__name__)

_BLOCK = 256
_STRIDE = 16  # a partial check takes every 16th row
_NUM_LISTED = 20


@dataclass(frozen=True)
class Served:
    """What serving has.

    Attributes:
        tokenizer: saved and loaded again, with its chat template.
        template: the one that training uses.
    """

    tokenizer: PreTrainedTokenizerBase
    template: Template

    def digest(self) -> str:
        """Return a hash of tokenizer, chat template and stop ids."""
        return contract_digest(self.tokenizer, self.template.stop_ids)


@dataclass
class Verified:
    """What was checked of one data set.

    Attributes:
        rows: rows looked at.
        bad_rows: rows that the reader refused; they are not trained.
        turns: trained answers that were proved.
        unprovable: trained answers whose prompts `--truncation llamafactory` cut.
        failures: rows where training and serving do not agree.
        examples: the messages of the first 20 of them, each with its place.
    """

    rows: int = 0
    bad_rows: int = 0
    turns: int = 0
    unprovable: int = 0
    failures: int = 0
    examples: list[str] = field(default_factory=list)

    def fail(self, problem: DataError) -> None:
        """Count a failure and keep its message."""
        self.failures += 1
        if len(self.examples) < _NUM_LISTED:
            self.examples.append(str(problem))


@dataclass(frozen=True)
class Contract:
    """What training promises to serving; saved as `contract` in `run.json`.

    Attributes:
        digest: of tokenizer, chat template and stop ids, as they are saved with the weights.
        stop_tokens: text -> id of what ends an answer.
        datasets: what was checked of each data set.
    """

    digest: str
    stop_tokens: Mapping[str, int]
    datasets: Mapping[str, Verified]

    @property
    def failures(self) -> int:
        """Rows where training and serving do not agree."""
        return sum(verified.failures for verified in self.datasets.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the contract as JSON values."""
        return asdict(self)

    def check(self) -> None:
        """Refuse to train what is not served.

        Raises:
            TemplateError: a row was not proved; its `file:line` is in the message.
        """
        if not self.failures:
            return
        lines = [line for verified in self.datasets.values() for line in verified.examples]
        raise TemplateError(
            f"In {self.failures} rows training and serving would not agree:\n  "
            + "\n  ".join(lines[:_NUM_LISTED])
        )


def contract_digest(tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]) -> str:
    """Return a hash of everything that decides what serving sends and where it stops."""
    parts = [tokenizer_digest(tokenizer), tokenizer.chat_template, sorted(stop_ids)]
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()


def as_served(
    tokenizer: PreTrainedTokenizerBase, template: Template, *, trust_remote_code: bool
) -> Served:
    """Save the tokenizer as a checkpoint does, and load it as serving does."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        reloaded = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    return Served(reloaded, template)


def verify_datasets(
    args: DataArgs,
    encode: ConversationEncoder,
    *,
    num_rows: int | None = None,
    trust_remote_code: bool = False,
) -> Contract:
    """Check training and evaluation sets against what serving will have.

    Args:
        args: names the data sets.
        encode: makes the samples of training.
        num_rows: rows to check of each set, spread over its first rows; None checks all.
        trust_remote_code: the operator's word, for tokenizers that bring code.
    """
    args = replace(args, on_bad_row="skip", max_bad_rows=1.0)  # training itself counts them
    served = as_served(encode.tokenizer, encode.template, trust_remote_code=trust_remote_code)
    datasets: dict[str, Verified] = {}
    for spec in load_dataset_specs(args, [*(args.dataset or ()), *(args.eval_dataset or ())]):
        bad_rows = BadRows(args.on_bad_row)
        rows = load_conversations(spec, data_args=args, bad_rows=bad_rows)
        datasets[spec.name] = Verified()
        chosen = rows if num_rows is None else _spread(rows, num_rows)
        while block := list(islice(chosen, _BLOCK)):
            _verify_block(block, encode, served, datasets[spec.name])
        datasets[spec.name].bad_rows = bad_rows.count
        _log(spec.name, datasets[spec.name])
    stops = dict(zip(encode.template.stop_tokens, encode.template.stop_ids, strict=True))
    return Contract(served.digest(), stops, datasets)


def _log(name: str, verified: Verified) -> None:
    logger.info(
        "%s: serving sends what is trained: %d answers of %d rows proved.",
        *(name, verified.turns, verified.rows),
    )
    if verified.unprovable:
        logger.warning(
            "%s: %d answers follow prompts that the truncation damaged; serving never sends them.",
            *(name, verified.unprovable),
        )


def _spread(rows: Iterator[Conversation], num_rows: int) -> Iterator[Conversation]:
    """Choose rows from all over the head of a set, or all of a short one."""
    head = list(islice(rows, num_rows * _STRIDE))
    step = max(len(head) // max(num_rows, 1), 1)
    return islice(iter(head[::step]), num_rows)


def _verify_block(
    block: Sequence[Conversation], encode: ConversationEncoder, served: Served, verified: Verified
) -> None:
    verified.rows += len(block)
    try:
        rows = encode(block)
    except DataError as problem:
        if len(block) == 1:
            verified.fail(problem)
            return
        verified.rows -= len(block)
        for conversation in block:
            _verify_block([conversation], encode, served, verified)
        return
    for encoded in rows:
        try:
            num_turns = verify_encoded(encoded, served)
            verified.turns += num_turns
            verified.unprovable += sum(len(draft.spans) for draft in encoded.drafts) - num_turns
        except TemplateError as problem:
            verified.fail(problem)


def verify_encoded(encoded: Encoded, served: Served) -> int:
    """Check every trained answer of one row and return how many were proved.

    Raises:
        TemplateError: serving would send other ids, or would not stop.
    """
    num_turns = 0
    for sample, draft in zip(encoded.samples, encoded.drafts, strict=True):
        try:
            for span in draft.spans:
                _check_end(draft, span, served)
                if draft.is_provable:
                    _check_prompt(draft, span, served)
                    num_turns += 1
            _check_labels(sample, draft)
        except TemplateError as problem:
            raise problem.at(encoded.source) from problem
    return num_turns


def _check_prompt(draft: Draft, span: Span, served: Served) -> None:
    chat, template = draft.chat, served.template
    trained = draft.ids[: span.start]
    switches = template.variables(span.enable_thinking)
    given = {name: switches[name] for name in template.thinking_switches if name in switches}
    sent: Any = served.tokenizer.apply_chat_template(
        [_plain(message) for message in chat.wire[: span.turn]],
        tools=_plain(chat.tools),
        add_generation_prompt=True,
        sanitize_control_tokens=True,
        return_dict=False,
        **given,
    )
    if sent == trained:
        return
    pairs = zip(sent, trained, strict=False)
    place = next((n for n, (one, other) in enumerate(pairs) if one != other), None)
    place = min(len(sent), len(trained)) if place is None else place
    decode = served.tokenizer.decode
    raise TemplateError(
        f"{template.label} trains another prompt than serving sends: "
        f"token {place} (message {span.turn}).",
        got=f"trained {decode(trained[place : place + 8])!r}",
        allowed=f"{decode(sent[place : place + 8])!r}, as apply_chat_template says",
        fix="choose another --template, or the tokenizer's own",
    )


def _check_end(draft: Draft, span: Span, served: Served) -> None:
    answer = draft.ids[span.start : span.end]
    stops = set(served.template.stop_ids)
    ends_well = stops.isdisjoint(answer) if span.is_cut else answer[-1] in stops
    if not ends_well or not stops.isdisjoint(answer[:-1]):
        raise TemplateError(
            f"{served.template.label} trains an answer that serving would not stop after "
            f"(message {span.turn}).",
            got=served.tokenizer.decode(answer[-8:]),
            allowed=served.template.stop_tokens,
        )


def _check_labels(sample: Sample, draft: Draft) -> None:
    learned = {number for span in draft.spans for number in range(span.start, span.end)}
    labelled = {n for n, label in enumerate(sample.labels) if label != IGNORE_INDEX}
    is_all = len(labelled) == len(sample.labels)  # train_on_prompt
    if sample.input_ids != draft.ids or not (is_all or labelled == learned):
        raise TemplateError("The labels of the row are not those of its answers.")


def _plain(value: Any) -> Any:
    """Return messages or tools without the guards of training: serving sets its own."""
    if isinstance(value, str):
        return unguarded(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
