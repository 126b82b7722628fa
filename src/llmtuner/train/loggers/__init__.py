"""Trackers that `--report_to` names, one file each."""

from llmtuner.extras.registry import Registry

LOGGERS = Registry("tracker", "llmtuner.train.loggers", exports="open_logger")
