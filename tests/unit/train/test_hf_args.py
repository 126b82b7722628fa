"""Our settings as transformers' training arguments."""

from pathlib import Path

import pytest
from transformers.training_args_seq2seq import Seq2SeqTrainingArguments

from llmtuner.train.hf_args import use_one_gpu


def test_one_process_never_spreads_over_gpus(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hf_args = Seq2SeqTrainingArguments(str(tmp_path), use_cpu=True, per_device_train_batch_size=4)
    hf_args._n_gpu = 2
    assert hf_args.train_batch_size == 8
    with caplog.at_level("WARNING", logger="llmtuner"):
        use_one_gpu(hf_args)
    assert hf_args.train_batch_size == 4
    assert "torchrun --nproc_per_node 2" in caplog.text
