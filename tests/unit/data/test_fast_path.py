"""The quick way through the data path gives what the plain way gives."""

import gc
import os
import time
import weakref
from collections.abc import Iterator
from itertools import chain

import pytest
from example_chats import CHATS
from jinja2.exceptions import SecurityError
from jinja2.runtime import LoopContext, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tiny_tokenizers import byte_level
from transformers.utils.chat_template_utils import mark_control_tokens, render_jinja_template

from llmtuner.data import blocks
from llmtuner.data.batch_ids import batch_ids
from llmtuner.data.blocks import BLOCK, map_blocks, older_objects_at_rest
from llmtuner.data.chat_jinja import render_chat
from llmtuner.data.conversation import Conversation, Message
from llmtuner.data.drafts import draft_turns
from llmtuner.data.jobs import run_jobs
from llmtuner.data.prompt import GUARD_END, GUARD_START, encode, guard, prepare_chat
from llmtuner.data.sandbox import Sandbox
from llmtuner.data.template import load_template
from llmtuner.data.templates import read_template, template_names
from llmtuner.extras.errors import DistributedError

TEXTS = ["", "a b", "<|im_start|>user\nhi<|im_end|>", "中文 \U0001f600\n\n", "a b", " lead", "</s>"]
MESSAGES = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "<b>q</b>  "},
    {"role": "assistant", "content": "a", "reasoning_content": "why"},
    {"role": "user", "content": "q2"},
    {"role": "assistant", "content": "a2\n"},
]


@pytest.mark.parametrize("split", [False, True, None])
@pytest.mark.parametrize("special", [False, True])
def test_batches_have_the_ids_of_the_tokenizer(split: bool | None, special: bool) -> None:
    tokenizer = byte_level()
    options = {} if split is None else {"split_special_tokens": split}
    expected = tokenizer(TEXTS, add_special_tokens=special, **options)["input_ids"]
    got = batch_ids(TEXTS, tokenizer, add_special_tokens=special, split_special_tokens=split)
    assert got == expected
    got[1].append(0)
    assert got[4] == expected[4]  # equal texts share no list


@pytest.mark.parametrize(
    "text", [*TEXTS, f"{GUARD_START}a", f"a{GUARD_END}", f"{GUARD_START}<|im_start|>{GUARD_END}"]
)
def test_guards_are_those_of_transformers(text: str) -> None:
    guards = load_template("chatml", byte_level()).guards
    assert guard(text, guards) == mark_control_tokens(text, guards)


def test_a_tokenizer_with_its_own_way_of_encoding_is_asked() -> None:
    tokenizer = byte_level.__wrapped__()

    class Shouting(type(tokenizer)):
        def _encode_plus(self, text, *args, **options):
            return super()._encode_plus([one.upper() for one in text], *args, **options)

    expected = tokenizer(["ABC"], add_special_tokens=False)["input_ids"]
    tokenizer.__class__ = Shouting
    assert batch_ids(["abc"], tokenizer) == expected


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_thoughts_have_all_their_names(name: str) -> None:
    text = "{{ messages[0].thinking }}|{{ messages[0].reasoning_content }}"
    messages = [{"role": "assistant", "content": "a", name: "why"}]
    texts, _ = render_jinja_template([messages], chat_template=text)
    got = render_chat(text, messages, tools=None, variables={}, generation_prompt=False)
    assert got.text == texts[0]


@pytest.mark.parametrize("name", template_names())
@pytest.mark.parametrize("until", [2, 3, 4, 5])
def test_templates_render_as_transformers_does(name: str, until: int) -> None:
    text, variables = read_template(name), {"bos_token": "<s>", "eos_token": "</s>"}
    asks = until % 2 == 0
    texts, marks = render_jinja_template(
        [MESSAGES[:until]],
        chat_template=text,
        add_generation_prompt=asks,
        return_assistant_tokens_mask=not asks,
        **variables,
    )
    got = render_chat(
        text, MESSAGES[:until], tools=None, variables=variables, generation_prompt=asks
    )
    assert got.text == texts[0]
    assert list(got.marks) == ([] if asks else marks[0])


LOOP = LoopContext(["a"], Undefined, lambda *_: "")


@pytest.mark.parametrize("value", ["text", 1, 1.5, True, None, [1], {"a": 1}, (1,), LOOP, str, len])
def test_kept_verdicts_are_the_sandbox_s_own(value: object) -> None:
    plain, quick = ImmutableSandboxedEnvironment(), Sandbox()
    for name in [*dir(value), "missing", "mro", "_a", "__a"]:
        expected = plain.is_safe_attribute(value, name, None)
        assert [quick.is_safe_attribute(value, name, None) for _ in range(2)] == [expected] * 2


@pytest.mark.parametrize(
    "text",
    [
        "{{ messages.append(1) }}",
        "{{ messages[0].update({}) }}",
        "{{ messages[0].__class__.__mro__ }}",
        "{{ messages[0]['content'].__class__.x }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ raise_exception.__globals__.x }}",
        "{% set n = namespace(a=1) %}{% set n._a = 2 %}",
    ],
)
def test_templates_do_not_break_out(text: str) -> None:
    # twice, since the second time the verdict is known
    for _ in range(2):
        with pytest.raises(Exception, match=r"unsafe|underscore|not safely") as caught:
            render_chat(text, MESSAGES, tools=None, variables={}, generation_prompt=False)
        assert isinstance(caught.value.__cause__, SecurityError)


@pytest.mark.parametrize("name", ["qwen", "chatml", "llama3"])
@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
def test_shared_beginnings_change_no_id(name: str, chat: Conversation) -> None:
    tokenizer = byte_level()
    template = load_template(name, tokenizer)
    assert template.cutting_stops
    prepared = prepare_chat(chat.messages, template=template, tools=None)
    turns = [n for n, message in enumerate(chat.messages) if message.train]
    [drafts] = run_jobs([draft_turns(prepared, turns)], tokenizer)
    for span in [span for draft in drafts for span in draft.spans]:
        text = prepared.render(
            span.turn, enable_thinking=span.enable_thinking, generation_prompt=True
        )
        draft = next(one for one in drafts if span in one.spans)
        assert draft.ids[: span.start] == encode(text.text, tokenizer)


def rows(count: int) -> Iterator[Conversation]:
    for number in range(count):
        yield Conversation((Message("text", str(number)),))


def test_blocks_keep_their_order_whichever_is_done_first() -> None:
    def slow_first(block: list[Conversation]) -> list[str]:
        time.sleep(0.05 if block[0].messages[0].content == "0" else 0)
        return [row.messages[0].content for row in block]

    count = 4 * BLOCK + 3
    done = map_blocks(rows(count), slow_first, num_workers=2)
    assert [*chain.from_iterable(done)] == [*map(str, range(count))]


def test_many_rows_go_to_a_process_for_each_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "num_usable_cores", lambda: 2)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")

    def process(block: list[Conversation]) -> tuple[int, str | None]:
        time.sleep(0.02)  # so that one worker cannot take all
        return os.getpid(), os.environ.get("TOKENIZERS_PARALLELISM")

    few = list(map_blocks(rows(BLOCK * 2), process, num_workers=None))
    assert {one for one, _ in few} == {os.getpid()}
    many = list(map_blocks(rows(BLOCK * 9), process, num_workers=None))
    assert len(many) == 9
    assert len({one for one, _ in many} - {os.getpid()}) == 2
    assert {threads for _, threads in many} == {"false"}  # the workers share the cores already
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"


@pytest.mark.parametrize("num_workers", [1, 2, None])
def test_what_comes_first_in_the_file_is_told_first(num_workers: int | None) -> None:
    def broken() -> Iterator[Conversation]:
        yield from rows(BLOCK)
        raise ValueError("unreadable")

    def refuse(block: list[Conversation]) -> list[str]:
        raise ValueError("refused")

    with pytest.raises(ValueError, match="refused"):
        list(map_blocks(broken(), refuse, num_workers=num_workers))
    seen = []
    with pytest.raises(ValueError, match="unreadable"):
        seen.extend(map_blocks(broken(), len, num_workers=num_workers))
    assert seen == [BLOCK]


class Ring:
    """An object that only a search for garbage can free."""

    def __init__(self) -> None:
        self.itself = self


def test_garbage_of_rows_is_found_while_older_objects_rest() -> None:
    gc.collect()
    older = Ring()
    seen = [weakref.ref(older)]
    with older_objects_at_rest():
        row = Ring()
        seen.append(weakref.ref(row))
        del older, row
        gc.collect()
        assert [one() is None for one in seen] == [False, True]
    gc.collect()
    assert [one() is None for one in seen] == [True, True]


def test_objects_that_rest_already_go_on_resting() -> None:
    gc.freeze()
    try:
        with older_objects_at_rest():
            pass
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()


def test_a_worker_that_was_killed_is_told() -> None:
    def die(block: list[Conversation]) -> None:
        os.kill(os.getpid(), 9)

    with pytest.raises(DistributedError, match="--preprocessing_num_workers 1"):
        list(map_blocks(rows(3 * BLOCK), die, num_workers=2))
