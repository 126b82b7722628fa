"""NEFTune: uniform noise on the embeddings while training.

transformers scales the noise by the length of a batch row, which in a flat batch is the whole
micro-batch. Here it is the length of each sample, so the layout does not change the noise's size.
Source: https://arxiv.org/abs/2310.05914.
"""

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmtuner.data.collate import Batch


class NeftuneNoise:
    """A forward hook of the embedding layer; it must be told the lengths before each batch."""

    def __init__(self, alpha: float) -> None:
        self._alpha = alpha
        self._lengths: Tensor | None = None

    def attach(self, model: PreTrainedModel | PeftModel) -> None:
        """Add the noise to the input embeddings of `model`, in training mode only."""
        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        inner.get_input_embeddings().register_forward_hook(self._add)

    def prepare(self, batch: Batch) -> None:
        """Note the tokens of the sample that each place of the batch belongs to."""
        if "cu_seq_lens_q" in batch:
            lengths = batch["cu_seq_lens_q"].diff()
            self._lengths = lengths.repeat_interleave(lengths)[None]  # [1, T]
        else:
            self._lengths = batch["attention_mask"].sum(1, keepdim=True)  # [B, 1]

    def _add(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if not module.training or self._lengths is None:
            return output
        size = self._alpha / (self._lengths * output.shape[-1]).sqrt()
        noise = torch.empty_like(output).uniform_(-1, 1)
        return output + noise * size[..., None].to(output.dtype)
