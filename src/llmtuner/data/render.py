"""From a conversation to ids and labels, with the contract between training and serving proved.

For every trained turn: the ids before the trained span are the ids of the prompt that serving
sends, and the span ends in an id that serving stops on. What cannot be proved stops the run.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from transformers import PreTrainedTokenizerBase

from llmtuner.data.batch_ids import batch_ids
from llmtuner.data.conversation import IGNORE_INDEX, Conversation, Message
from llmtuner.data.drafts import Draft, draft_turns
from llmtuner.data.fitted import Fit, Fitted
from llmtuner.data.jobs import Job, run_jobs
from llmtuner.data.prompt import prepare_chat
from llmtuner.data.template import Template
from llmtuner.data.truncation import TRUNCATIONS
from llmtuner.extras.errors import DataError, LlmtunerError


@dataclass(frozen=True)
class Sample:
    """One sequence to train on.

    Attributes:
        input_ids: token ids.
        trained: [start, end) of what the model learns, in order.
        source: `file:line` or `file#row` of the row.
    """

    input_ids: list[int]
    trained: tuple[tuple[int, int], ...]
    source: str

    @property
    def labels(self) -> list[int]:
        """The ids where the model learns them, else IGNORE_INDEX; not shifted."""
        labels = [IGNORE_INDEX] * len(self.input_ids)
        for start, end in self.trained:
            labels[start:end] = self.input_ids[start:end]
        return labels

    @property
    def supervised_tokens(self) -> int:
        """The tokens that are targets; the first one has nothing to be predicted from."""
        return sum(end - max(start, 1) for start, end in self.trained)


@dataclass(frozen=True)
class Encoded:
    """What became of one row.

    Attributes:
        samples: empty when nothing of the row can be trained on.
        source: `file:line` or `file#row` of the row.
        drafts: what each sample was made of; none for plain texts.
        num_turns_dropped: trained turns that did not fit.
        is_prompt_cut: text of a user or tool was cut, or turns before the trained ones dropped.
        is_answer_cut: an answer lost its tail, and its end token with it.
        num_thoughts_unasked: answers with or without a thought, where serving does it the other
            way unless it is told.
    """

    samples: tuple[Sample, ...]
    source: str = ""
    drafts: tuple[Draft, ...] = field(default=(), compare=False, repr=False)
    num_turns_dropped: int = 0
    is_prompt_cut: bool = False
    is_answer_cut: bool = False
    num_thoughts_unasked: int = 0

    @property
    def is_truncated(self) -> bool:
        """Whether the row lost anything to `cutoff_len`."""
        return self.is_prompt_cut or self.is_answer_cut or self.num_turns_dropped > 0

    @property
    def is_left_out(self) -> bool:
        """Whether nothing of the row is trained on."""
        return not self.samples


def encode_conversations(
    conversations: Sequence[Conversation],
    *,
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    cutoff_len: int | None = None,
    truncation: str = "turns",
    mask_history: bool = False,
    train_on_prompt: bool = False,
) -> list[Encoded]:
    """Render, prove and tokenise conversations, with one call of the tokenizer for all of them.

    Args:
        conversations: messages of which some are to be learned.
        template: from `load_template`.
        tokenizer: the one the template was loaded for.
        cutoff_len: longest sample in tokens; None for no limit.
        truncation: how longer samples are cut.
        mask_history: learn the last answer only.
        train_on_prompt: learn the prompt too.

    Raises:
        TemplateError: the contract cannot be proved for a turn.
        DataError: tools or arguments are not JSON, or a row is a plain text.
    """
    fit = TRUNCATIONS.get(truncation)
    jobs = [
        _encode(
            conversation,
            template=template,
            cutoff_len=cutoff_len,
            fit=fit,
            mask_history=mask_history,
            train_on_prompt=train_on_prompt,
        )
        for conversation in conversations
    ]
    return run_jobs(jobs, tokenizer)


def _encode(
    conversation: Conversation,
    *,
    template: Template,
    cutoff_len: int | None,
    fit: Fit,
    mask_history: bool,
    train_on_prompt: bool,
) -> Job[Encoded]:
    messages = conversation.messages
    make_chat = partial(prepare_chat, template=template, tools=conversation.tools)
    try:
        _check_no_text(conversation)
        trained = _trained_turns(messages, mask_history=mask_history)
        drafts = yield from draft_turns(make_chat(messages), trained)
        fitted = [Fitted([draft]) for draft in drafts]
        if cutoff_len is not None:
            fitted = []
            for draft in drafts:
                part = yield from fit(draft, messages, make_chat=make_chat, cutoff_len=cutoff_len)
                fitted.append(part)
    except LlmtunerError as problem:
        raise problem.at(conversation.source) from problem
    kept = [draft for result in fitted for draft in result.drafts]
    samples = [_to_sample(draft, conversation.source, train_on_prompt) for draft in kept]
    return Encoded(
        tuple(samples),
        conversation.source,
        drafts=tuple(kept),
        num_turns_dropped=sum(result.num_turns_dropped for result in fitted),
        is_prompt_cut=any(result.is_prompt_cut for result in fitted),
        is_answer_cut=any(result.is_answer_cut for result in fitted),
        num_thoughts_unasked=sum(s.is_thought_unasked for draft in kept for s in draft.spans),
    )


def _check_no_text(conversation: Conversation) -> None:
    if any(message.role == "text" for message in conversation.messages):
        raise DataError(
            "This row is a plain text, without a question and an answer.",
            fix="use --stage pt, or name the columns of questions and answers",
        )


def _trained_turns(messages: Sequence[Message], *, mask_history: bool) -> list[int]:
    trained = [n for n, message in enumerate(messages) if message.train]
    if not mask_history:
        return trained
    last = max((n for n, m in enumerate(messages) if m.role == "assistant"), default=-1)
    return [n for n in trained if n == last]


def encode_texts(
    documents: Sequence[Conversation],
    *,
    tokenizer: PreTrainedTokenizerBase,
    cutoff_len: int | None = None,
) -> list[Encoded]:
    """Tokenise pre-training documents: everything is learned, the end of each text too.

    A document longer than `cutoff_len` becomes several samples; nothing is dropped or overwritten.
    BOS stands in front of each sample where the tokenizer itself puts it in front of a text.

    Raises:
        DataError: a row is a conversation, or the tokenizer has no end-of-text token.
    """
    for document in documents:
        if any(message.role != "text" for message in document.messages):
            raise DataError(
                "Pre-training needs texts, and this row is a conversation.",
                fix="use --stage sft, or map the text column with `columns`",
                where=document.source,
            )
    if tokenizer.eos_token_id is None:
        raise DataError(
            "The tokenizer has no eos_token, so documents would run into each other.",
            fix="set one with --add_special_tokens",
        )
    texts = ["\n".join(message.content for message in d.messages) for d in documents]
    batch = batch_ids(texts, tokenizer, add_special_tokens=True, split_special_tokens=True)
    return [
        _document(ids if text else [], document.source, tokenizer, cutoff_len)
        for ids, text, document in zip(batch, texts, documents, strict=True)
    ]


def _document(
    ids: list[int], source: str, tokenizer: PreTrainedTokenizerBase, cutoff_len: int | None
) -> Encoded:
    """Return the samples of one document."""
    if not ids:
        return Encoded((), source)
    bos = ids[:1] if ids[0] == tokenizer.bos_token_id else []
    body = ids[len(bos) :]
    if body[-1:] != [tokenizer.eos_token_id]:
        body.append(tokenizer.eos_token_id)
    size = max((cutoff_len or len(ids) + 1) - len(bos), 1)
    starts = list(range(0, len(body), size))
    if not bos and len(body) - starts[-1] == 1 and len(starts) > 1:
        starts[-1] -= 1  # a token alone in its sample would never be learned
    ends = [*starts[1:], len(body)]
    pieces = [bos + body[start:end] for start, end in zip(starts, ends, strict=True)]
    return Encoded(tuple(Sample(piece, ((0, len(piece)),), source) for piece in pieces), source)


def _to_sample(draft: Draft, source: str, train_on_prompt: bool) -> Sample:
    spans = [(span.start, span.end) for span in draft.spans]
    return Sample(draft.ids, ((0, len(draft.ids)),) if train_on_prompt else tuple(spans), source)
