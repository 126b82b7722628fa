"""Write the golden ids and masks of all named templates: `python tools/regenerate_goldens.py`.

One file is made with a tokenizer that is trained on the spot, one with the tokenizer of MiniMind
where it is at hand. docs/templates.md tells what the texts were compared with. Every sample that
changes is printed: look at it before you commit it, and give the reason in the commit.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests/unit/data")]

from golden_texts import FOLDER, GOLDEN_NAMES, MINIMIND, golden_ids, golden_tokenizer  # noqa: E402

from llmtuner.extras.files import write_json  # noqa: E402


def regenerate(kind: str) -> None:
    """Write one golden file and print every sample that is not as it was."""
    path = FOLDER / f"{kind}.json"
    old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    new = {name: golden_ids(kind, name) for name in GOLDEN_NAMES}
    write_json(path, new)
    for name, chats in new.items():
        tokenizer = golden_tokenizer(kind, name)
        for chat, samples in chats.items():
            if old.get(name, {}).get(chat) != samples:
                texts = [tokenizer.decode([int(n) for n in ids.split()]) for ids, _ in samples]
                print(kind, name, chat, texts, [mask for _, mask in samples], sep="\n    ")


regenerate("byte_level")
if MINIMIND.is_dir():
    regenerate("minimind")
else:
    print("minimind.json stays as it was: there is no folder `shared` beside the repository.")
