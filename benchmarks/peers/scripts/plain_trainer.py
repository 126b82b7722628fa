"""Trains with peft, bitsandbytes and transformers' Trainer on tokenised rows."""

import torch
from datasets import Dataset
from options import read_options, read_tokens, trainer_settings
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)


def load_model(options):
    """Return the model of a method: whole, or frozen with adapters on all linear layers."""
    if options.method == "full":
        return AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    if options.method == "lora":
        dtype = torch.bfloat16 if options.best else torch.float32
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
    else:
        few_bits = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        model = AutoModelForCausalLM.from_pretrained(
            options.model, quantization_config=few_bits, dtype=torch.bfloat16
        )
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=not options.best)
    lora = LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, lora)


def main() -> None:
    """Train, and save the result."""
    options = read_options()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = load_model(options)
    args = TrainingArguments(
        **trainer_settings(options),
        bf16=options.best or options.method == "qlora",
    )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(read_tokens(options.tokens)),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
