"""Other libraries' behaviour, changed from outside; each with its reason and when it may go."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from peft.import_utils import is_bnb_4bit_available, is_bnb_available

from llmtuner.extras.libraries import absent

_SHARED_BUFFERS = "deepspeed_shm_comm"


@contextmanager
def peft_without_bitsandbytes() -> Iterator[None]:
    """Let peft make adapters without importing bitsandbytes, unless the model has its layers.

    For each layer peft asks first whether it is one of bitsandbytes, and imports the library for
    the question: half a second, and 30 MB with the parts of torch's compiler. A model that has
    such layers has loaded it already.
    Affected: peft 0.21, `LoraModel._create_new_module`. To be removed when it looks at the
    layer before it imports the library.
    """
    if "bitsandbytes" in sys.modules:
        yield
        return
    try:
        with absent("bitsandbytes"):
            _ask_again()
            yield
    finally:
        _ask_again()  # peft remembers the answer, which must not reach the next model


@contextmanager
def deepspeed_without_own_buffers() -> Iterator[None]:
    """Let DeepSpeed start on CPUs without the buffers of its operator for inference.

    It compiles the operator at the first start (20 s), and every rank of every start reserves 69 MB
    of shared memory for it, which stays there when the process has ended, until the machine starts
    again. Training never calls it.
    Affected: DeepSpeed 0.19, `deepspeed/comm/torch.py`. To be removed when it makes the buffers
    with the first call of `inference_all_reduce`, and removes them.
    """
    from deepspeed.ops import __compatible_ops__ as usable

    before = usable.get(_SHARED_BUFFERS, False)
    usable[_SHARED_BUFFERS] = False
    try:
        yield
    finally:
        usable[_SHARED_BUFFERS] = before


def _ask_again() -> None:
    is_bnb_available.cache_clear()
    is_bnb_4bit_available.cache_clear()
