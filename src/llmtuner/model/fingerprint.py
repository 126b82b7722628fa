"""Which weights these are: a short name for what a model in memory would answer."""

import hashlib

import torch
from torch import nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

_SAMPLES = 16


def weights_digest(model: nn.Module) -> str:
    """Return a hash of the shapes and of a few values of every parameter.

    Training changes every value of what it trains, so that samples tell other weights apart and
    nothing large is read. Under ZeRO-3 the values are those of this rank's share.
    """
    is_sharded = is_deepspeed_zero3_enabled()
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        values = parameter.ds_tensor if is_sharded else parameter.detach()
        digest.update(f"{name} {tuple(values.shape)} {values.dtype}".encode())
        flat = values.reshape(-1)
        some = flat[:: max(1, flat.numel() // _SAMPLES)]
        digest.update(some.to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()[:32]
