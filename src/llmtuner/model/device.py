"""What a device can compute with; choices take a described one, so that none has to be there."""

import inspect
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from transformers.utils.import_utils import is_liger_kernel_available

FLASH_ATTN = "flash_attn"
TORCH_VARLEN = "torch_varlen"
LIGER_KERNEL = "liger_kernel"

_AMPERE = (8, 0)


@dataclass(frozen=True)
class Device:
    """One device and the libraries beside it.

    Attributes:
        type: "cpu", "cuda", …
        capability: of an NVIDIA GPU, as in "sm_80": (8, 0); (0, 0) elsewhere.
        libraries: of `FLASH_ATTN`, `TORCH_VARLEN` and `LIGER_KERNEL`, those that are installed.
    """

    type: str
    capability: tuple[int, int] = (0, 0)
    libraries: frozenset[str] = frozenset()

    @property
    def runs_flash(self) -> bool:
        """Whether FlashAttention-2's kernels, the library's or torch's own, run on it."""
        return self.type == "cuda" and self.capability >= _AMPERE


def describe_device(device_type: str) -> Device:
    """Describe this process's device of that type."""
    if device_type != "cuda":
        return Device(device_type)
    return Device(
        device_type,
        torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0),
        frozenset(_libraries()),
    )


def _libraries() -> list[str]:
    found = [FLASH_ATTN] if find_spec(FLASH_ATTN) is not None else []
    if torch.backends.cuda.is_flash_attention_available() and has_torch_varlen():
        found.append(TORCH_VARLEN)
    return found + ([LIGER_KERNEL] if is_liger_kernel_available() else [])


def has_torch_varlen() -> bool:
    """Tell whether this torch has its kernel for samples end to end, with windows and groups."""
    if find_spec("torch.nn.attention.varlen") is None:
        return False
    from torch.nn.attention.varlen import varlen_attn  # only now: not every torch has it

    return {"window_size", "enable_gqa", "scale"} <= inspect.signature(
        varlen_attn
    ).parameters.keys()
