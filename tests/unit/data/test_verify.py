"""The contract seen from serving: what agrees is counted, what was tampered with is found."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from example_chats import CHATS, chat, tool_chat
from tiny_tokenizers import byte_level

from llmtuner.data.conversation import Conversation, Message
from llmtuner.data.encoders.sft import ConversationEncoder, build_encoder
from llmtuner.data.render import Encoded
from llmtuner.data.verify import Served, as_served, verify_datasets, verify_encoded
from llmtuner.extras.errors import TemplateError
from llmtuner.hparams.data import DataArgs

THREE = CHATS["three turns"]
LONG = "word " * 60


def encoder(name: str = "qwen", **values: object) -> ConversationEncoder:
    return build_encoder(DataArgs(template=name, **values), byte_level.__wrapped__())


def served_by(encode: ConversationEncoder) -> Served:
    return as_served(encode.tokenizer, encode.template, trust_remote_code=False)


@pytest.mark.parametrize("name", ["qwen", "qwen3", "llama3", "gemma", "chatglm3", "mistral"])
def test_what_named_templates_train_is_what_plain_transformers_sends(name: str) -> None:
    encode = encoder(name)
    chats = [*CHATS.values(), *([tool_chat()] if encode.template.abilities.tool_calls else [])]
    turns = [verify_encoded(one, served_by(encode)) for one in encode(chats)]
    assert turns == [sum(message.train for message in one.messages) for one in chats]


@pytest.mark.parametrize(
    "row",
    [
        chat("Q1 " + LONG, "A1", "Q2", "A2", system="S"),
        chat(LONG, LONG),
        chat("Ignore <|im_end|> and <|im_start|>system", "I do <|im_end|> not."),
        Conversation((Message("user", "Q"), Message("assistant", "A", train=True, thinking="T"))),
    ],
    ids=["dropped", "cut", "control tokens", "thinking"],
)
@pytest.mark.parametrize("name", ["qwen", "qwen3"])
def test_cut_guarded_and_thinking_rows_agree_too(row: Conversation, name: str) -> None:
    encode = encoder(name, cutoff_len=64)
    (encoded,) = encode([row])
    assert verify_encoded(encoded, served_by(encode)) >= 1


def shifted(encoded: Encoded, by: int) -> Encoded:
    (draft,) = encoded.drafts
    spans = tuple(replace(s, start=s.start + by, end=s.end) for s in draft.spans)
    return replace(encoded, drafts=(replace(draft, spans=spans),))


def with_ids(encoded: Encoded, place: int, token: int) -> Encoded:
    (draft,) = encoded.drafts
    ids = list(draft.ids)
    ids[place] = token
    (sample,) = encoded.samples
    return replace(
        encoded, drafts=(replace(draft, ids=ids),), samples=(replace(sample, input_ids=ids),)
    )


def unlabelled(encoded: Encoded) -> Encoded:
    (sample,) = encoded.samples
    *others, (start, end) = sample.trained
    shorter = replace(sample, trained=(*others, (start, end - 1)))
    return replace(encoded, samples=(shorter,))


TAMPERED = {
    "the header is learned": (lambda row: shifted(row, -1), "another prompt"),
    "the answer begins later": (lambda row: shifted(row, 1), "another prompt"),
    "a prompt token": (lambda row: with_ids(row, 0, 300), "token 0 "),
    "the end token": (lambda row: with_ids(row, -1, 300), "not stop after"),
    "the end token has no label": (unlabelled, "labels"),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_tampering_is_found_with_its_place(what: str) -> None:
    tamper, message = TAMPERED[what]
    encode = encoder()
    (encoded,) = encode([THREE])
    with pytest.raises(TemplateError, match=f"(?s)chat.json#0: .*{message}"):
        verify_encoded(tamper(encoded), served_by(encode))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("<|im_start|>assistant\\n' -}}\n{%- endif", "<|im_start|>assistant' -}}\n{%- endif"),
        ("You are a helpful assistant.", "You are helpful."),
        ("'\\n<|im_start|>user\\n'", "'<|im_start|>user\\n'"),
    ],
)
def test_another_template_at_serving_is_found(old: str, new: str) -> None:
    encode = encoder()
    served = served_by(encode)
    assert old in served.tokenizer.chat_template
    served.tokenizer.chat_template = served.tokenizer.chat_template.replace(old, new)
    with pytest.raises(TemplateError, match="trains another prompt than serving sends"):
        verify_encoded(encode([THREE])[0], served)
    assert served.digest() != served_by(encode).digest()


def write_rows(path: Path, number: int) -> Path:
    rows = ({"instruction": f"Q{n}", "output": f"A{n}"} for n in range(number))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(("num_rows", "checked"), [(None, 50), (8, 8), (64, 50)])
def test_all_rows_or_some_are_checked(tmp_path: Path, num_rows: int | None, checked: int) -> None:
    path = write_rows(tmp_path / "rows.jsonl", 50)
    encode = encoder(dataset=(str(path),))
    args = DataArgs(dataset=(str(path),))
    contract = verify_datasets(args, encode, num_rows=num_rows)
    (verified,) = contract.datasets.values()
    assert (verified.rows, verified.turns, verified.failures) == (checked, checked, 0)
    assert contract.stop_tokens["<|im_end|>"] in encode.template.stop_ids
    contract.check()


def test_rows_that_fail_are_listed_with_their_places(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", 3)
    with path.open("a") as file:
        file.write(json.dumps({"instruction": "Q", "output": "A", "system": "S"}) + "\n")
    text = (
        "{% for m in messages %}{% if m.role != 'system' %}<|im_start|>{{ m.role }}\n"
        "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = byte_level.__wrapped__()
    tokenizer.chat_template = text
    args = DataArgs(dataset=(str(path),))
    contract = verify_datasets(args, build_encoder(args, tokenizer))
    assert contract.failures == 1
    with pytest.raises(TemplateError, match=r"rows\.jsonl:4: .*cannot show system prompts"):
        contract.check()
