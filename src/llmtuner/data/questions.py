"""Prompts to be answered by a model, with the answers of the data beside them.

A prompt is what serving sends for the turns before the last trained one, whole: `cutoff_len` is for
training, and the expected answer takes no room from its question. Only a prompt that leaves no room
for an answer in the model's context is shortened, as training shortens rows.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from llmtuner.data.blocks import map_blocks
from llmtuner.data.conversation import Conversation, Message
from llmtuner.data.dataset_info import DatasetSpec, load_dataset_specs
from llmtuner.data.drafts import draft_turns
from llmtuner.data.encoders.sft import ConversationEncoder
from llmtuner.data.jobs import Job, run_jobs
from llmtuner.data.prompt import prepare_chat
from llmtuner.data.records import BadRows
from llmtuner.data.rows import load_conversations
from llmtuner.data.shorten import cut_texts, exchange_starts, first_that_fits
from llmtuner.data.template import Template
from llmtuner.extras.errors import DataError, LlmtunerError
from llmtuner.hparams.data import DataArgs

PromptOf = Callable[[Sequence[Message]], Job[list[int]]]
"""Returns the ids that serving sends for these turns."""


@dataclass(frozen=True)
class Question:
    """A prompt and the answer that the data has for it.

    Attributes:
        prompt: token ids, exactly as serving sends them.
        label: token ids of the answer in the data, with the token that ends it.
        source: `file:line` or `file#row` of the row.
        is_cut: the prompt lost its oldest turns, or text in them.
        is_thought_unasked: the answer thinks and the prompt asks for none, or the other way round.
    """

    prompt: list[int]
    label: list[int]
    source: str
    is_cut: bool = False
    is_thought_unasked: bool = False


@dataclass(frozen=True)
class QuestionSet:
    """The questions of one evaluation set, in file order.

    Attributes:
        questions: one for each row that has an answer to learn.
        num_left_out: rows without one, or that cannot be used.
    """

    questions: tuple[Question, ...]
    num_left_out: int = 0


def load_question_sets(
    args: DataArgs,
    encode: ConversationEncoder,
    *,
    evals: Mapping[str, Dataset],
    room: int | None,
) -> dict[str, QuestionSet]:
    """Return the questions of every evaluation set, under the names of `evals`.

    Args:
        args: the data settings.
        encode: of the stage; its template renders the prompts.
        evals: the tokenised sets; they say which rows a split holds out.
        room: longest prompt in tokens; None for no limit.

    Raises:
        DataError: a row cannot be used, or its prompt cannot be made short enough.
    """
    load = partial(_load_questions, args=args, encode=encode, room=room)
    eval_specs = load_dataset_specs(args, args.eval_dataset or ())
    if eval_specs and args.eval_on_each_dataset:
        sets = {spec.name: load([spec], wanted=None) for spec in eval_specs}
    elif eval_specs:
        sets = {"": load(eval_specs, wanted=None)}
    else:
        specs = load_dataset_specs(args, args.dataset or ())
        sets = {name: load(specs, wanted=set(rows["source"])) for name, rows in evals.items()}
    for name, found in sets.items():
        if not found.questions:
            raise DataError(
                f"The evaluation set {name}".rstrip() + " has no row to predict.",
                got=f"{found.num_left_out} rows without an answer to learn",
                fix="use other data",
            )
    return sets


def encode_questions(
    conversations: Iterable[Conversation],
    *,
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    room: int | None = None,
) -> Iterator[Question | DataError | None]:
    """Yield the question of each conversation.

    None stands for a row without a trained answer, and an error for one whose prompt stays too
    long without any text of the user.

    Args:
        conversations: rows of a data set.
        template: from `load_template`.
        tokenizer: the one the template was loaded for.
        room: longest prompt in tokens; None for no limit.
    """

    def work(block: list[Conversation]) -> list[Question | DataError | None]:
        return run_jobs((_question(row, template, room) for row in block), tokenizer)

    yield from chain.from_iterable(map_blocks(conversations, work, num_workers=1))


def _load_questions(
    specs: Sequence[DatasetSpec],
    *,
    args: DataArgs,
    encode: ConversationEncoder,
    room: int | None,
    wanted: Collection[str] | None,
) -> QuestionSet:
    """Return the questions of some data sets; of the wanted rows only where these are given."""
    questions: list[Question] = []
    num_left_out = 0
    for spec in specs:
        bad_rows = BadRows(args.on_bad_row)
        rows: Iterator[Conversation] = load_conversations(spec, data_args=args, bad_rows=bad_rows)
        if wanted is not None:
            rows = _only(rows, wanted, is_endless=args.streaming)
        for found in encode_questions(
            rows, template=encode.template, tokenizer=encode.tokenizer, room=room
        ):
            if isinstance(found, Question):
                questions.append(found)
            elif found is not None:
                bad_rows.add(found)
                num_left_out += 1
            else:
                num_left_out += 1
    return QuestionSet(tuple(questions), num_left_out)


def _only(
    rows: Iterator[Conversation], wanted: Collection[str], *, is_endless: bool
) -> Iterator[Conversation]:
    """Yield the wanted rows; a stream is read no further than to the last one of them."""
    missing = set(wanted)
    for row in rows:
        if row.source in wanted:
            missing.discard(row.source)
            yield row
        if is_endless and not missing:
            return


def _question(
    conversation: Conversation, template: Template, room: int | None
) -> Job[Question | DataError | None]:
    messages, tools = conversation.messages, conversation.tools
    turn = max((n for n, message in enumerate(messages) if message.train), default=None)
    if turn is None or messages[turn].role == "text":
        yield from ()
        return None
    make_chat = partial(prepare_chat, template=template, tools=tools)
    try:
        (draft,) = yield from draft_turns(make_chat(messages[: turn + 1]), [turn])
        span = draft.spans[-1]
        setting = template.enable_thinking
        if setting is None:  # then the data decides
            setting = span.enable_thinking

        def prompt_of(shown: Sequence[Message]) -> Job[list[int]]:
            chat = make_chat(shown)
            rendered = chat.render(len(shown), enable_thinking=setting, generation_prompt=True)
            (ids,) = yield [rendered.text]
            return ids

        whole = yield from prompt_of(messages[:turn])
        prompt = yield from _fitted(whole, messages[:turn], prompt_of, room)
    except LlmtunerError as problem:
        raise problem.at(conversation.source) from problem
    question = Question(
        prompt,
        draft.ids[span.start : span.end],
        conversation.source,
        is_cut=len(prompt) < len(whole),
        is_thought_unasked=span.is_thought_unasked,
    )
    return _too_long(question, room) if room is not None and len(prompt) > room else question


def _fitted(
    whole: list[int], messages: Sequence[Message], prompt_of: PromptOf, room: int | None
) -> Job[list[int]]:
    """Return the prompt, without its oldest exchanges, then texts, where it is too long.

    What no cut can shorten may still be too long.
    """
    if room is None or len(whole) <= room:
        return whole

    def measure(shown: Sequence[Message]) -> Job[int]:
        return len((yield from prompt_of(shown)))

    num_system = int(messages[0].role == "system")
    shorter = [[*messages[:num_system], *messages[n:]] for n in exchange_starts(messages)]
    sizes = [sum(len(message.content) for message in some) for some in shorter]
    first = yield from first_that_fits(
        lambda number: measure(shorter[number]), sizes, len(whole), room
    )
    if first < len(shorter):
        return (yield from prompt_of(shorter[first]))
    kept = shorter[-1] if shorter else list(messages)
    length = yield from measure(kept)
    kept, _ = yield from cut_texts(kept, measure, length=length, room=room)
    return (yield from prompt_of(kept))


def _too_long(question: Question, room: int) -> DataError:
    return DataError(
        "The prompt does not fit, even without the user's text: the system prompt, the tools and "
        "the template are too long.",
        where=question.source,
        got=f"{len(question.prompt)} tokens",
        allowed=f"{room} tokens beside the answer",
        fix="lower --max_new_tokens, shorten the system prompt, or pass --on_bad_row skip",
    )
