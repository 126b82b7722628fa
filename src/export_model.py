"""Merge and export: the same as `llmtuner export`."""

import sys

from llmtuner.cli.main import program

if __name__ == "__main__":
    sys.exit(program("export"))
