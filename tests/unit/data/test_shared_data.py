"""Real files of other projects load, or are refused with a place; needs the shared folder."""

from collections import Counter
from pathlib import Path

import pytest

from llmtuner.data.dataset_info import load_dataset_specs
from llmtuner.data.records import BadRows
from llmtuner.data.rows import load_conversations
from llmtuner.extras.errors import DataError
from llmtuner.hparams.data import DataArgs

SHARED = Path(__file__).parents[3].parent / "shared" / "data"

pytestmark = pytest.mark.skipif(
    not SHARED.is_dir(), reason="there is no folder `shared` with real data beside the repository"
)

FOLDERS = (
    "llama_factory", "medicalgpt", "delicate_medical_r1", "lora_identity", "toyhom", "xtuner",
    "torchtune", "fastchat",
)  # fmt: skip

# file -> conversations, trained turns, documents
WHOLE = {
    "llama_factory/alpaca_en_demo.json": (999, 999, 0),
    "llama_factory/alpaca_zh_demo.json": (1000, 1000, 0),
    "llama_factory/c4_demo.jsonl": (300, 300, 300),
    "llama_factory/glaive_toolcall_en_demo.json": (300, 957, 0),
    "llama_factory/identity.json": (91, 91, 0),
    "llama_factory/reason_tool_use_demo_50.jsonl": (50, 112, 0),
    "llama_factory/v1_sft_demo.jsonl": (500, 500, 0),
    "llama_factory/wiki_demo.txt": (30, 30, 30),
    "medicalgpt/en_article_tail500.txt": (426, 426, 426),
    "medicalgpt/fever.txt": (985, 985, 985),
    "medicalgpt/grpo_sample.jsonl": (32, 32, 0),
    "medicalgpt/medical_corpus.txt": (87, 87, 0),
    "medicalgpt/medical_sft_1K_format.jsonl": (1000, 1000, 0),
    "delicate_medical_r1/val.jsonl": (241, 241, 0),
    "lora_identity/lora_identity.jsonl": (91, 91, 0),
    "toyhom/internal_medicine_first1000.gb18030.csv": (1000, 1000, 0),
    "toyhom/internal_medicine_first1000.utf8.csv": (1000, 1000, 0),
    "xtuner/openai_sft.jsonl": (128, 128, 0),
    "xtuner/pretrain_example_data.jsonl": (3, 3, 3),
    "torchtune/alpaca_tiny.json": (100, 100, 0),
    "torchtune/chat_tiny.json": (1, 2, 0),
    "torchtune/instruct_tiny.json": (2, 2, 0),
    "fastchat/dummy_conversation.json": (500, 1000, 0),
}
# file -> conversations left when bad rows are skipped, bad rows, the first refusal
PARTLY = {
    "llama_factory/glaive_toolcall_zh_demo.json": (298, 2, "json#197: Turn 3 is a tool result"),
    "medicalgpt/glaive_toolcall_zh_demo.jsonl": (298, 2, "jsonl:198: Turn 3 is a tool result"),
    "medicalgpt/sharegpt_zh_first400.jsonl": (397, 3, r"jsonl:59: Turn 3 \(user\) is empty"),
}
REFUSED = {
    "llama_factory/dpo_zh_demo.json": "json#0: The row is preference data",
    "xtuner/gsm8k_val_example_data.jsonl": "jsonl:1: No dataset format fits.*reward_model",
    "torchtune/stack_exchange_paired_tiny.json": "json#0: No dataset format fits.*response_j",
}


def load(name: str, bad_rows: BadRows) -> tuple[int, int, int]:
    args = DataArgs(dataset_dir=str(SHARED), on_bad_row=bad_rows.on_bad_row)
    (spec,) = load_dataset_specs(args, [name])
    conversations = list(load_conversations(spec, data_args=args, bad_rows=bad_rows))
    turns = [message for one in conversations for message in one.messages]
    trained = sum(message.train for message in turns)
    return len(conversations), trained, Counter(message.role for message in turns)["text"]


def test_every_file_is_in_one_of_the_tables() -> None:
    names = {f"{folder}/{path.name}" for folder in FOLDERS for path in (SHARED / folder).iterdir()}
    assert names - {"llama_factory/dataset_info.json"} == {*WHOLE, *PARTLY, *REFUSED}


@pytest.mark.parametrize("name", WHOLE)
def test_loads_whole(name: str) -> None:
    assert load(name, BadRows()) == WHOLE[name]


@pytest.mark.parametrize("name", PARTLY)
def test_loads_but_for_bad_rows(name: str) -> None:
    num_good, num_bad, refusal = PARTLY[name]
    with pytest.raises(DataError, match=refusal):
        load(name, BadRows())
    bad_rows = BadRows("skip")
    assert load(name, bad_rows)[0] == num_good
    assert bad_rows.count == num_bad


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused_with_its_place(name: str) -> None:
    with pytest.raises(DataError, match=REFUSED[name]):
        load(name, BadRows())


def test_the_entries_of_llama_factory_load() -> None:
    args = DataArgs(dataset_dir=str(SHARED / "llama_factory"))
    names = ["identity", "alpaca_zh_demo", "glaive_toolcall_en_demo", "wiki_demo", "c4_demo"]
    counts = [
        sum(1 for _ in load_conversations(spec, data_args=args, bad_rows=BadRows()))
        for spec in load_dataset_specs(args, names)
    ]
    assert counts == [91, 1000, 300, 30, 300]
    with pytest.raises(DataError, match="dpo_zh_demo: The data set is for preference training"):
        load_dataset_specs(args, ["dpo_zh_demo"])
    with pytest.raises(DataError, match=r"mllm_demo: columns\.images is not supported"):
        load_dataset_specs(args, ["mllm_demo"])


def test_both_encodings_of_a_file_read_alike() -> None:
    args = DataArgs(dataset_dir=str(SHARED / "toyhom"))
    names = [f"internal_medicine_first1000.{kind}.csv" for kind in ("gb18030", "utf8")]
    told = [
        [one.messages for one in load_conversations(spec, data_args=args, bad_rows=BadRows())]
        for spec in load_dataset_specs(args, names)
    ]
    assert told[0] == told[1]
