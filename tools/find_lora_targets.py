"""Show a model's structure and LoRA targets: the same as `llmtuner targets`."""

import sys

from llmtuner.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["targets", *sys.argv[1:]]))
