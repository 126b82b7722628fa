"""Train: the same as `llmtuner train`."""

import sys

from llmtuner.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
