"""The model for generation: adapters merged, in the type that this device runs best."""

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from llmtuner.extras.errors import ConfigError
from llmtuner.extras.logs import get_logger
from llmtuner.hparams.model import ModelArgs
from llmtuner.model.adapter_fit import check_chain
from llmtuner.model.adapters import locate_adapters, vocabulary_rows
from llmtuner.model.attention import pick_padded_attention
from llmtuner.model.hub import locate_model
from llmtuner.model.load import load_config, load_model
from llmtuner.model.merge import attach_adapter, merge_adapters
from llmtuner.model.parameters import cast_parameters
from llmtuner.model.precision import device_has_bf16

logger = get_logger(__name__)

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def load_for_inference(
    args: ModelArgs, *, num_tokens: int = 0, use_cpu: bool = False
) -> PreTrainedModel | PeftModel:
    """Load the base with its adapters, ready to generate.

    Args:
        args: base, adapters and how to load them.
        num_tokens: length of the tokenizer.
        use_cpu: ignore a GPU that is there.

    Returns:
        The model in evaluation mode, on its device. Adapters are merged in float32, but for a
        quantised base, where the one adapter stays beside the weights.

    Raises:
        ModelError: base or adapter is missing, damaged, or they do not belong together.
    """
    on_gpu = torch.cuda.is_available() and not use_cpu
    device = "cuda" if on_gpu else "cpu"
    adapters = locate_adapters(args)
    check_chain(adapters, locate_model(args))
    is_quantised = args.quantization_bit is not None
    if is_quantised and len(adapters) > 1:
        raise ConfigError(
            "A quantised base takes one adapter.",
            where="adapter_name_or_path",
            got=args.adapter_name_or_path,
            fix="merge them with `llmtuner export` first, or drop --quantization_bit",
        )
    dtype = pick_inference_dtype(args.infer_dtype, on_gpu=on_gpu)
    logger.info("Generating in %s on %s.", str(dtype).removeprefix("torch."), device)
    model = load_model(
        args,
        dtype=torch.float32 if adapters and not is_quantised else dtype,
        attention=pick_padded_attention(args.flash_attn, device, config=load_config(args)),
        device=None if is_quantised else device,
        num_tokens=num_tokens,
        min_rows=max(map(vocabulary_rows, adapters), default=0),
        for_training=False,
    )
    model.eval()
    if is_quantised and adapters:
        return attach_adapter(model, adapters[0])
    if adapters:
        model = merge_adapters(model, adapters)
        cast_parameters(model, dtype)
    return model


def pick_inference_dtype(infer_dtype: str, *, on_gpu: bool) -> torch.dtype:
    """Return the type asked for; "auto" is bfloat16 where the device has it, else the next best."""
    if infer_dtype in _DTYPES:
        return _DTYPES[infer_dtype]
    if device_has_bf16(on_gpu=on_gpu):
        return torch.bfloat16
    return torch.float16 if on_gpu else torch.float32
