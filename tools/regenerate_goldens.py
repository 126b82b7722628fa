"""Write the golden texts of all named templates: `python tools/regenerate_goldens.py`.

Every text was compared by hand with what the template's model or LLaMA-Factory 0.7.1 writes. Look
at the difference before you commit it, and give the reason in the commit.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests/unit/data")]

from golden_texts import GOLDENS, golden_texts  # noqa: E402

from llmtuner.data.templates import template_names  # noqa: E402
from llmtuner.extras.files import write_json  # noqa: E402

write_json(GOLDENS, {name: golden_texts(name) for name in template_names()})
