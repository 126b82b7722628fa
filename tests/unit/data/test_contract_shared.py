"""Every trained turn of real data sets keeps the contract under real templates; needs `shared`.

As a program it checks all rows: `python tests/unit/data/test_contract_shared.py`.
"""

import time

import pytest
from real_templates import SHARED, fitting_tokenizer, real_template
from test_shared_data import PARTLY, WHOLE

from llmtuner.data.encoders.sft import ConversationEncoder
from llmtuner.data.template import load_template
from llmtuner.data.verify import Contract, verify_datasets
from llmtuner.hparams.data import DataArgs

TEMPLATES = [
    "Qwen-Qwen2.5-7B-Instruct", "Qwen-Qwen3-0.6B", "Qwen3.5-4B", "GLM-4.6", "openai-gpt-oss-120b",
    "Mistral-Small-3.2-24B-Instruct-2506", "deepseek-ai-DeepSeek-V3.2", "MiniMax-M2",
    "ibm-granite-granite-4.0", "HuggingFaceTB-SmolLM3-3B", "meta-llama-Llama-3.2-3B-Instruct",
    "moonshotai-Kimi-K2",
]  # fmt: skip
WITHOUT_TOOLS = {"HuggingFaceTB-SmolLM3-3B"}
DATASETS = [name for name, (_, _, texts) in WHOLE.items() if not texts] + list(PARTLY)
TOOL_DATASETS = [name for name in DATASETS if "tool" in name]


def verify(name: str, datasets: list[str], num_rows: int | None) -> Contract:
    text = real_template(name)
    tokenizer = fitting_tokenizer(name, text)
    template = load_template(None, tokenizer)
    tokenizer.chat_template = template.serving_text()
    encode = ConversationEncoder(template, tokenizer, cutoff_len=1 << 20)
    args = DataArgs(dataset=tuple(datasets), dataset_dir=str(SHARED))
    return verify_datasets(args, encode, num_rows=num_rows)


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="there is no folder `shared` with real data")
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_part_of_every_data_set_keeps_the_contract(name: str) -> None:
    datasets = [one for one in DATASETS if name not in WITHOUT_TOOLS or one not in TOOL_DATASETS]
    verify(name, datasets, num_rows=8).check()


if __name__ == "__main__":
    for one in TEMPLATES:
        start = time.monotonic()
        for dataset in DATASETS:
            found = verify(one, [dataset], num_rows=None).datasets[dataset]
            print(one, dataset, found.rows, found.turns, found.failures, sep="\t", flush=True)
            for example in dict.fromkeys(line.split(": ", 1)[-1] for line in found.examples[:4]):
                print("   ", example[:200])
        print(one, f"{time.monotonic() - start:.0f} s", sep="\t", flush=True)
