"""Merge and export: the same as `llmtuner export`."""

import sys

from llmtuner.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
