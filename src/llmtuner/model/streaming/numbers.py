"""Number types of weight files as numpy arrays; numpy has no bfloat16, so it is done by its bits.

torch would do the same, but importing it takes longer than merging a small model.
"""

import sys
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

STORED: Mapping[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}
"""safetensors' name of each floating type that can be read -> how its bytes are laid out."""

DTYPE_NAMES: Mapping[str, str] = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
}
"""safetensors' name -> the name in `config.json`."""

STORED_NAMES: Mapping[str, str] = {name: stored for stored, name in DTYPE_NAMES.items()}
"""The name in `config.json` -> safetensors' name."""

_BF16_EXPONENT = np.uint16(0x7F80)

assert sys.byteorder == "little", "safetensors files are little-endian"


def to_float32(stored: np.ndarray, dtype: str) -> Float32:
    """Return stored numbers in float32; the array is the caller's own.

    Args:
        stored: as `STORED[dtype]` says.
        dtype: safetensors' name of their type.
    """
    if dtype == "BF16":
        wide = stored.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    return stored.astype(np.float32)


def from_float32(values: Float32, dtype: str) -> np.ndarray:
    """Round finite numbers to the nearest ones of another type, ties to even, as torch does.

    Numbers that are too large for it become infinite.
    """
    if dtype == "BF16":
        bits = values.view(np.uint32)
        carry = bits >> 16
        carry &= 1
        carry += 0x7FFF
        carry += bits
        carry >>= 16
        return carry.astype(np.uint16)
    with np.errstate(over="ignore"):
        return values.astype(STORED[dtype], copy=False)


def all_finite(stored: np.ndarray, dtype: str) -> bool:
    """Tell whether no number is NaN or infinite."""
    if dtype == "BF16":
        return not bool(((stored & _BF16_EXPONENT) == _BF16_EXPONENT).any())
    return bool(np.isfinite(stored).all())
