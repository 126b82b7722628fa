"""Other libraries' habits that are changed, and are theirs again afterwards."""

import sys

import pytest
from peft.import_utils import is_bnb_4bit_available, is_bnb_available
from tiny_models import tiny_config
from transformers import LlamaForCausalLM

from llmtuner.hparams.lora import LoraArgs
from llmtuner.model.methods import lora
from llmtuner.model.patches import deepspeed_without_own_buffers, peft_without_bitsandbytes


@pytest.fixture
def _not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process seem never to have loaded bitsandbytes."""
    for name in [name for name in sys.modules if name.split(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.usefixtures("_not_loaded")
def test_peft_does_not_see_bitsandbytes_and_forgets_it() -> None:
    before = is_bnb_available()
    with peft_without_bitsandbytes():
        assert not is_bnb_available()
        assert not is_bnb_4bit_available()
    assert is_bnb_available() == before


@pytest.mark.usefixtures("_not_loaded")
def test_an_adapter_is_made_without_bitsandbytes() -> None:
    model = LlamaForCausalLM(tiny_config())
    lora._add(model, LoraArgs(), grown=[])
    assert "bitsandbytes" not in sys.modules


def test_a_loaded_bitsandbytes_is_left_to_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", sys)
    with peft_without_bitsandbytes():
        assert sys.modules["bitsandbytes"] is sys


def test_deepspeed_compiles_and_shares_nothing_to_start_on_a_cpu() -> None:
    pytest.importorskip("deepspeed")
    from deepspeed.accelerator import get_accelerator
    from deepspeed.comm.torch import build_shm_op
    from deepspeed.ops import __compatible_ops__ as usable

    before = dict(usable)
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None:
        pytest.skip("only on CPUs")
    assert builder.NAME in usable, "DeepSpeed has another name for it now"
    with deepspeed_without_own_buffers():
        assert build_shm_op() is None
    assert dict(usable) == before
