"""Options of the base model: where it is, how it is loaded, quantised and patched."""

from typing import Literal

from pydantic.dataclasses import dataclass

from llmtuner.hparams.arg import CHECKED_WHEN_MADE, arg


@dataclass(frozen=True, kw_only=True, config=CHECKED_WHEN_MADE)
class ModelArgs:
    """Which model to start from and how to load it."""

    model_name_or_path: str | None = arg(None, "Folder or hub name of the base model.")
    adapter_name_or_path: tuple[str, ...] | None = arg(
        None, "LoRA adapters to load; all but the last are merged into the base first."
    )
    adapter_folder: str | None = arg(None, "Folder that holds the adapters named above.")
    cache_dir: str | None = arg(None, "Where downloaded models are kept. Unset: the hub's cache.")
    model_revision: str = arg("main", "Branch, tag or commit on the hub.")
    trust_remote_code: bool = arg(False, "Run Python code that comes with the model.")
    train_from_scratch: bool = arg(False, "Take the model's shape only and start at random.")

    use_fast_tokenizer: bool = arg(True, "Use the tokenizer written in Rust.")
    resize_vocab: bool = arg(False, "Grow the embeddings when tokens were added.")
    add_tokens: tuple[str, ...] | None = arg(None, "Words to add to the vocabulary.")
    add_special_tokens: tuple[str, ...] | None = arg(None, "Special tokens to add.")

    flash_attn: Literal["auto", "off", "sdpa", "fa2"] = arg(
        "auto", "Attention kernel; auto takes the fastest one that is installed."
    )
    rope_scaling: Literal["linear", "dynamic", "yarn", "llama3"] | None = arg(
        None, "Stretch the positions to read longer texts."
    )
    fast_kernels: bool = arg(
        True, "On a CPU in bf16, train layers of known models with kernels compiled on first use."
    )
    disable_gradient_checkpointing: bool = arg(
        False, "Keep all activations: faster, needs more memory."
    )
    use_reentrant_gc: bool = arg(True, "Use the reentrant kind of gradient checkpointing.")
    upcast_layernorm: bool = arg(False, "Keep the norm weights in float32.")
    upcast_lmhead_output: bool = arg(False, "Compute the logits in float32.")
    moe_aux_loss_coef: float | None = arg(
        None, "Weight of the load-balancing loss of mixture-of-experts models.", low=0
    )
    print_param_status: bool = arg(
        False, "List every parameter with its type and whether it learns."
    )

    quantization_method: Literal["bnb"] = arg("bnb", "Library that quantises on loading.")
    quantization_bit: Literal[4, 8] | None = arg(
        None, "Load the base quantised (QLoRA); only with finetuning_type lora.", unit="bits"
    )
    quantization_type: Literal["nf4", "fp4"] = arg("nf4", "Number format of 4-bit weights.")
    double_quantization: bool = arg(True, "Quantise the scales of 4-bit weights as well.")
    quantization_device_map: Literal["auto"] | None = arg(
        None, "Spread a quantised model over the devices."
    )

    infer_backend: Literal["huggingface"] = arg("huggingface", "Engine that generates text.")
    infer_dtype: Literal["auto", "float16", "bfloat16", "float32"] = arg(
        "auto", "Number type of the weights when generating or exporting."
    )
    offload_folder: str = arg("offload", "Where weights go that fit no device.")
    use_kv_cache: bool = arg(True, "Keep keys and values while generating.")
    hf_hub_token: str | None = arg(None, "Login token of the Hugging Face hub.", secret=True)
    ms_hub_token: str | None = arg(None, "Login token of the ModelScope hub.", secret=True)
