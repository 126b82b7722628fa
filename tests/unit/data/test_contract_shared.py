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
# Templates that lose calls beside calls, words beside calls, thoughts after results, or all tools.
LESS_ABLE = {
    "deepseek-ai-DeepSeek-V3.2",
    "openai-gpt-oss-120b", "Mistral-Small-3.2-24B-Instruct-2506", "HuggingFaceTB-SmolLM3-3B",
    "meta-llama-Llama-3.2-3B-Instruct",
}  # fmt: skip
REFUSALS = ("the template changes", "cannot show", "only supports single tool-calls")
DATASETS = [name for name, (_, _, texts) in WHOLE.items() if not texts] + list(PARTLY)


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
    contract = verify(name, DATASETS, num_rows=8)
    for dataset, found in contract.datasets.items():
        assert found.turns or "tool" in dataset
        if name in LESS_ABLE and "tool" in dataset:
            told = [line for line in found.examples if not any(why in line for why in REFUSALS)]
            assert not told
        else:
            assert not found.examples


if __name__ == "__main__":
    for one in TEMPLATES:
        start = time.monotonic()
        for dataset in DATASETS:
            found = verify(one, [dataset], num_rows=None).datasets[dataset]
            print(one, dataset, found.rows, found.turns, found.failures, sep="\t", flush=True)
            for example in dict.fromkeys(line.split(": ", 1)[-1] for line in found.examples[:4]):
                print("   ", example[:200])
        print(one, f"{time.monotonic() - start:.0f} s", sep="\t", flush=True)
