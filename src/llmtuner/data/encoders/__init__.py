"""What each stage makes of its rows: the folder is the registry, the stage's name is the key."""

from llmtuner.extras.registry import Registry

ENCODERS = Registry("stage", __name__, exports="build_encoder")
