"""Evaluate: the same as `llmtuner eval`."""

import sys

from llmtuner.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["eval", *sys.argv[1:]]))
