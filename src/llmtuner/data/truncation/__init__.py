"""How a sample is made to fit into `cutoff_len`: the folder is the registry of `--truncation`."""

from llmtuner.extras.registry import Registry

TRUNCATIONS = Registry("truncation", __name__, exports="fit")
