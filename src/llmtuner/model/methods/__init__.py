"""Finetuning methods: one file each; a user names them by `finetuning_type`."""

from llmtuner.extras.registry import Registry

METHODS = Registry("finetuning method", "llmtuner.model.methods", exports="load_for_training")
