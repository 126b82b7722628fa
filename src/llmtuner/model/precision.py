"""Which number type a run computes in, and why."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch

from llmtuner.extras.errors import ConfigError

PrecisionName = Literal["bf16", "fp16", "fp32"]

_DTYPES: dict[PrecisionName, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}
# What torch reports for processors that multiply bfloat16 matrices in hardware (x86, then ARM).
_CPU_BF16_FEATURES = ("amx_bf16", "avx512_bf16", "bf16", "arm_bf16")


@dataclass(frozen=True)
class Precision:
    """The number type of a run.

    Attributes:
        name: type of the matrix products and of frozen weights.
        pure: trained weights and optimizer state are of this type too; otherwise they are float32.
        reason: why this type, for the log.
    """

    name: PrecisionName
    pure: bool
    reason: str

    @property
    def dtype(self) -> torch.dtype:
        """The torch type of `name`."""
        return _DTYPES[self.name]

    @property
    def trained_dtype(self) -> torch.dtype:
        """The type of weights that learn."""
        return self.dtype if self.pure else torch.float32

    def autocast(self, device_type: str) -> AbstractContextManager[object]:
        """Return the context for a forward pass: weights of two types meet only inside it."""
        if self.pure or self.name == "fp32":
            return nullcontext()
        return torch.autocast(device_type, dtype=self.dtype)


def pick_precision(*, bf16: bool | None, fp16: bool, pure_bf16: bool, use_cpu: bool) -> Precision:
    """Choose the number type of a training run.

    Args:
        bf16: True: asked for; False: ruled out; None: taken where the device has it.
        fp16: asked for.
        pure_bf16: trained weights in bfloat16 too.
        use_cpu: ignore a GPU that is there.

    Raises:
        ConfigError: the flags contradict each other, or the device cannot do what is asked.
    """
    on_gpu = torch.cuda.is_available() and not use_cpu
    has_bf16 = device_has_bf16(on_gpu=on_gpu)
    device = "GPU" if on_gpu else "CPU"
    if fp16:
        return _fp16(bf16=bf16, pure_bf16=pure_bf16, on_gpu=on_gpu)
    if pure_bf16 and bf16 is False:
        raise ConfigError("--pure_bf16 and --no_bf16 contradict each other.", fix="drop one")
    if bf16 or pure_bf16:
        if on_gpu and not has_bf16:
            raise ConfigError("This GPU has no bfloat16.", got="bf16", fix="use --fp16")
        flag = "pure_bf16" if pure_bf16 else "bf16"
        slow = "" if has_bf16 else "; this CPU has no bfloat16 units, fp32 is likely faster"
        return Precision("bf16", pure_bf16, f"asked for by {flag}{slow}")
    if bf16 is None and has_bf16:
        return Precision("bf16", False, f"the {device} multiplies bfloat16 in hardware")
    if bf16 is None:
        return Precision("fp32", False, f"the {device} has no bfloat16 units")
    return Precision("fp32", False, "bf16 was ruled out")


def device_has_bf16(*, on_gpu: bool) -> bool:
    """Tell whether the GPU, or else the CPU, multiplies bfloat16 in hardware."""
    if on_gpu:
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    features = torch.cpu.get_capabilities()
    return any(features.get(name, False) for name in _CPU_BF16_FEATURES)


def _fp16(*, bf16: bool | None, pure_bf16: bool, on_gpu: bool) -> Precision:
    if bf16 or pure_bf16:
        raise ConfigError("--fp16 and --bf16 contradict each other.", fix="drop one of them")
    if not on_gpu:
        raise ConfigError(
            "float16 training needs a GPU.",
            got="fp16",
            allowed="bf16, fp32",
            fix="use --bf16, or neither flag to take what this CPU does best",
        )
    return Precision("fp16", False, "asked for by fp16")
