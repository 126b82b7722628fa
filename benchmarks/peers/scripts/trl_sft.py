"""Trains with TRL's SFTTrainer on tokenised rows."""

from datasets import Dataset
from options import read_options, read_tokens, trainer_settings
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer


def main() -> None:
    """Train, and save the result."""
    options = read_options()
    settings = {}
    if options.best:
        # Full training keeps float32 weights, which bfloat16 computing reads: small changes
        # would be lost in bfloat16 weights.
        dtype = "float32" if options.method == "full" else "bfloat16"
        settings = {"gradient_checkpointing": False, "model_init_kwargs": {"dtype": dtype}}
    args = SFTConfig(
        max_length=options.cutoff_tokens,
        **trainer_settings(options),
        **settings,
    )
    lora = LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    trainer = SFTTrainer(
        model=options.model,
        args=args,
        train_dataset=Dataset.from_list(read_tokens(options.tokens)),
        processing_class=AutoTokenizer.from_pretrained(options.model),
        peft_config=None if options.method == "full" else lora,
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
