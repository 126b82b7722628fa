"""`train`, `weight` and `loss_weight` on a message decide, token by token, what is learned."""

from typing import Any

import pytest
from example_chats import encode_conversation
from tiny_tokenizers import byte_level

from llmtuner.data.conversation import IGNORE_INDEX
from llmtuner.data.formats import FORMATS
from llmtuner.data.template import load_template
from llmtuner.data.turns import check_conversation
from llmtuner.extras.errors import DataError

SHAPES = {
    "openai": ("messages", "role", "content", "user", "assistant"),
    "sharegpt": ("conversations", "from", "value", "human", "gpt"),
}
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES)


def row(shape: str, *flags: dict[str, Any]) -> dict[str, Any]:
    """Return a row of questions and answers in turn, one for each of `flags`."""
    column, role, content, user, assistant = SHAPES[shape]
    messages = [
        {role: (user, assistant)[number % 2], content: f"turn {number}", **flag}
        for number, flag in enumerate(flags)
    ]
    return {column: messages}


def labels_of(trained: list[bool]) -> tuple[list[int], list[int]]:
    """Return the ids and labels of that many turns, prompts and answers tokenised apart."""
    ids: list[int] = []
    labels: list[int] = []
    prompt = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    for number, is_trained in enumerate(trained):
        if number % 2 == 0:
            prompt += f"<|im_start|>user\nturn {number}<|im_end|>\n<|im_start|>assistant\n"
            continue
        answer = f"turn {number}<|im_end|>"
        if not is_trained:
            prompt += f"{answer}\n"
            continue
        for text, is_learned in ((prompt, False), (answer, True)):
            part = byte_level().encode(text, add_special_tokens=False)
            ids += part
            labels += part if is_learned else [IGNORE_INDEX] * len(part)
        prompt = "\n"
    tail = byte_level().encode(prompt.removesuffix("\n"), add_special_tokens=False)
    return ids + tail, labels + [IGNORE_INDEX] * len(tail)


@EVERY_SHAPE
@pytest.mark.parametrize(
    ("flags", "trained"),
    [
        (({}, {}, {}, {}), (True, True)),
        (({}, {"train": False}, {}, {}), (False, True)),
        (({}, {}, {}, {"weight": 0}), (True, False)),
        (({"weight": 0}, {"weight": 1}, {"train": False}, {"loss_weight": 0.0}), (True, False)),
        (({}, {"train": True, "weight": 1.0}, {}, {"loss_weight": None}), (True, True)),
        (({"train": None}, {"train": 0}, {}, {"train": 1}), (False, True)),
    ],
)
def test_the_mask_token_by_token(
    shape: str, flags: tuple[dict[str, Any], ...], trained: tuple[bool, bool]
) -> None:
    conversation = FORMATS.get(shape)(row(shape, *flags))
    check_conversation(conversation)
    template = load_template("qwen", byte_level())
    encoded = encode_conversation(conversation, template=template, tokenizer=byte_level())
    (sample,) = encoded.samples
    ids, labels = labels_of([False, trained[0], False, trained[1]])
    length = max(n for n, label in enumerate(labels) if label != IGNORE_INDEX) + 1
    assert sample.input_ids[:length] == ids[:length]
    assert sample.labels[:length] == labels[:length]
    assert set(sample.labels[length:]) <= {IGNORE_INDEX}


@EVERY_SHAPE
@pytest.mark.parametrize("key", ["train", "weight", "loss_weight"])
@pytest.mark.parametrize("value", [0.5, 2, -1, "true", "1", "", [], {}, float("nan")])
def test_other_values_are_refused(shape: str, key: str, value: object) -> None:
    said = rf"Message 2: The '{key}' is neither 0 nor 1.*Allowed: 0 \(not trained\) or 1"
    with pytest.raises(DataError, match=said) as caught:
        FORMATS.get(shape)(row(shape, {}, {key: value}))
    assert caught.value.kind == "bad_weight"


@EVERY_SHAPE
def test_flags_that_disagree_and_questions_that_ask_to_be_trained(shape: str) -> None:
    with pytest.raises(DataError, match="disagree") as caught:
        FORMATS.get(shape)(row(shape, {}, {"train": True, "weight": 0}))
    assert caught.value.kind == "bad_weight"
    with pytest.raises(DataError, match=r"Turn 1 \(user\) asks to be trained") as caught:
        check_conversation(FORMATS.get(shape)(row(shape, {"train": True}, {})))
    assert caught.value.kind == "untrainable_turn"


@EVERY_SHAPE
def test_a_row_without_a_trained_turn_is_left_out(shape: str) -> None:
    conversation = FORMATS.get(shape)(row(shape, {}, {"train": False}))
    check_conversation(conversation)
    template = load_template("qwen", byte_level())
    encoded = encode_conversation(conversation, template=template, tokenizer=byte_level())
    assert encoded.is_left_out
    assert not encoded.samples
