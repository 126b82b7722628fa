"""Evaluate: the same as `llmtuner eval`."""

import sys

from llmtuner.cli.main import program

if __name__ == "__main__":
    sys.exit(program("eval"))
