"""From a conversation to ids and labels, with the contract between training and serving proved.

For every trained turn: the ids before the trained span are the ids of the prompt that serving
sends, and the span ends in an id that serving stops on. What cannot be proved stops the run.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from llmtuner.data.conversation import IGNORE_INDEX, Conversation, Message
from llmtuner.data.prompt import prepare_chat
from llmtuner.data.spans import Draft, encode_turns
from llmtuner.data.template import Template
from llmtuner.data.truncate import Fitted, fit
from llmtuner.extras.errors import DataError, LlmtunerError


@dataclass(frozen=True)
class Sample:
    """One sequence to train on.

    Attributes:
        input_ids: token ids.
        labels: the same ids where the model learns them, else IGNORE_INDEX; not shifted.
        source: `file:line` or `file#row` of the row.
    """

    input_ids: list[int]
    labels: list[int]
    source: str


@dataclass(frozen=True)
class Encoded:
    """What became of one row.

    Attributes:
        samples: empty when nothing of the row can be trained on.
        source: `file:line` or `file#row` of the row.
        num_turns_dropped: trained turns that did not fit.
        is_prompt_cut: text of a user or tool was cut, or turns before the trained ones dropped.
        is_answer_cut: an answer lost its tail, and its end token with it.
    """

    samples: tuple[Sample, ...]
    source: str = ""
    num_turns_dropped: int = 0
    is_prompt_cut: bool = False
    is_answer_cut: bool = False

    @property
    def is_truncated(self) -> bool:
        """Whether the row lost anything to `cutoff_len`."""
        return self.is_prompt_cut or self.is_answer_cut or self.num_turns_dropped > 0

    @property
    def is_left_out(self) -> bool:
        """Whether nothing of the row is trained on."""
        return not self.samples


def encode_conversation(
    conversation: Conversation,
    *,
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    cutoff_len: int | None = None,
    mask_history: bool = False,
    train_on_prompt: bool = False,
) -> Encoded:
    """Render, prove and tokenise one conversation.

    Args:
        conversation: messages of which some are to be learned.
        template: from `load_template`.
        tokenizer: the one the template was loaded for.
        cutoff_len: longest sample in tokens; None for no limit.
        mask_history: learn the last answer only.
        train_on_prompt: learn the prompt too.

    Raises:
        TemplateError: the contract cannot be proved for a turn.
        DataError: tools or arguments are not JSON.
    """
    messages, tools = conversation.messages, conversation.tools
    if any(message.role == "text" for message in messages):
        raise DataError(
            "This row is a plain text, without a question and an answer.",
            fix="use --stage pt, or name the columns of questions and answers",
            where=conversation.source,
        )
    trained = [n for n, message in enumerate(messages) if message.train]
    if mask_history:
        last = max((n for n, m in enumerate(messages) if m.role == "assistant"), default=-1)
        trained = [n for n in trained if n == last]

    def drafts_of(messages: Sequence[Message], trained: Iterable[int]) -> list[Draft]:
        chat = prepare_chat(messages, template=template, tools=tools)
        return encode_turns(chat, trained, tokenizer=tokenizer)

    try:
        drafts = drafts_of(messages, trained)
        fitted = [fit(draft, messages, encode=drafts_of, cutoff_len=cutoff_len) for draft in drafts]
    except LlmtunerError as problem:
        raise problem.at(conversation.source) from problem
    kept = [draft for result in fitted for draft in result.drafts]
    samples = (_to_sample(draft, conversation.source, train_on_prompt) for draft in kept)
    return _summary(tuple(samples), conversation.source, fitted)


def encode_text(
    conversation: Conversation,
    *,
    tokenizer: PreTrainedTokenizerBase,
    cutoff_len: int | None = None,
) -> Encoded:
    """Tokenise one pre-training document: everything is learned, the end of the text too.

    A document longer than `cutoff_len` becomes several samples; nothing is dropped. BOS stands in
    front where the tokenizer itself puts it.

    Raises:
        DataError: the row is a conversation, or the tokenizer has no end-of-text token.
    """
    text = "\n".join(message.content for message in conversation.messages)
    if any(message.role != "text" for message in conversation.messages):
        raise DataError(
            "Pre-training needs texts, and this row is a conversation.",
            fix="use --stage sft, or map the text column with `columns`",
            where=conversation.source,
        )
    if tokenizer.eos_token_id is None:
        raise DataError(
            "The tokenizer has no eos_token, so documents would run into each other.",
            fix="set one with --add_special_tokens",
        )
    ids = tokenizer.encode(text, add_special_tokens=True, split_special_tokens=True)
    if not text or not ids:
        return Encoded((), conversation.source)
    if ids[-1] != tokenizer.eos_token_id:
        ids = [*ids, tokenizer.eos_token_id]
    size = cutoff_len or len(ids)
    pieces = [ids[start : start + size] for start in range(0, len(ids), size)]
    samples = (Sample(piece, list(piece), conversation.source) for piece in pieces)
    return Encoded(tuple(samples), conversation.source)


def _to_sample(draft: Draft, source: str, train_on_prompt: bool) -> Sample:
    if train_on_prompt:
        return Sample(draft.ids, list(draft.ids), source)
    labels = [IGNORE_INDEX] * len(draft.ids)
    for start, end in draft.spans:
        labels[start:end] = draft.ids[start:end]
    return Sample(draft.ids, labels, source)


def _summary(samples: tuple[Sample, ...], source: str, fitted: Sequence[Fitted]) -> Encoded:
    return Encoded(
        samples,
        source,
        num_turns_dropped=sum(result.num_turns_dropped for result in fitted),
        is_prompt_cut=any(result.is_prompt_cut for result in fitted),
        is_answer_cut=any(result.is_answer_cut for result in fitted),
    )
