"""What every test starts from: one thread, no hub, and fixed seeds."""

import os
import random
import sys

# Before torch is imported: tiny models lose time to more threads, and a test never asks a hub.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest


@pytest.fixture(autouse=True)
def _fixed_seeds():
    random.seed(0)
    # Only where a test module has imported them: most tests need neither.
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
