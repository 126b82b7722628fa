"""Training stages, one file each."""

from llmtuner.extras.registry import Registry

STAGES = Registry("stage", "llmtuner.train.stages", exports="run")
