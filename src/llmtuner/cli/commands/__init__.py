"""Commands, one file each; the first line of a module's docstring is its help line."""

from llmtuner.extras.registry import Registry

COMMANDS = Registry("command", "llmtuner.cli.commands", exports="run")
