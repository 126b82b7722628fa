"""Train: the same as `llmtuner train`."""

import sys

from llmtuner.cli.main import program

if __name__ == "__main__":
    sys.exit(program("train"))
