"""Tokenising in batches gives what tokenising one by one gives, with any number of processes."""

from collections.abc import Generator
from itertools import chain

import pytest
from example_chats import CHATS, chat, tool_chat
from tiny_tokenizers import byte_level, sentence_piece

from llmtuner.data.blocks import map_blocks
from llmtuner.data.encoders.sft import ConversationEncoder, build_encoder
from llmtuner.data.jobs import encode_all, run_jobs
from llmtuner.hparams.data import DataArgs

LONG = "什么是高血压？ word " * 30
ROWS = [
    *CHATS.values(),
    tool_chat(),
    chat("a <|im_end|> b", "c <|im_start|> d"),
    chat("Q1 " + LONG, "A1", "Q2", "A2", system="S"),
    chat(LONG, LONG),
    chat("Q", "A" + LONG, "Q2 " + LONG, "A2"),
    *(chat(f"Q{n}", "A" * n, f"R{n}", "B") for n in range(1, 9)),
]


def encoder(name: str = "qwen") -> ConversationEncoder:
    return build_encoder(DataArgs(template=name, cutoff_len=64), byte_level.__wrapped__())


@pytest.mark.parametrize("name", ["qwen", "qwen3", "vanilla"])
def test_a_batch_is_its_rows(name: str) -> None:
    encode = encoder(name)
    rows = [row for row in ROWS if not row.tools] if name == "vanilla" else ROWS
    rows = [row for row in rows if name != "vanilla" or row.messages[0].role != "system"]
    together = encode(rows)
    assert together == [encode([row])[0] for row in rows]
    assert sum(one.is_truncated for one in together) >= 2
    assert encode([]) == []


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("block", [1, 3, 100])
def test_blocks_and_processes_change_nothing(
    monkeypatch: pytest.MonkeyPatch, num_workers: int, block: int
) -> None:
    monkeypatch.setattr("llmtuner.data.blocks.BLOCK", block)
    encode = encoder()
    done = map_blocks(ROWS, encode, num_workers=num_workers)
    assert [*chain.from_iterable(done)] == encode(ROWS)


def test_jobs_of_different_lengths_keep_their_order() -> None:
    def job(number: int) -> Generator[list[str], list[list[int]], tuple[int, int]]:
        seen = 0
        for turn in range(number):
            ids = yield [f"{number} {turn}"] * turn
            seen += sum(map(len, ids))
        return number, seen

    results = run_jobs([job(number) for number in (3, 0, 2, 5)], byte_level())
    assert [number for number, _ in results] == [3, 0, 2, 5]
    assert results[1][1] == 0
    assert results[3][1] > results[0][1] > 0


@pytest.mark.parametrize("tokenizer", [byte_level(), sentence_piece()])
def test_encoding_all_is_encoding_each(tokenizer) -> None:
    texts = ["", "a", "<|im_start|>user\n高血压<|im_end|>", " b ", "\U000f0000<|im_end|>\U000f0001"]
    assert encode_all(texts, tokenizer) == [encode_all([text], tokenizer)[0] for text in texts]
    ends = [
        tokenizer.convert_tokens_to_ids("<|im_end|>") in ids for ids in encode_all(texts, tokenizer)
    ]
    assert ends == [False, False, True, False, False]
