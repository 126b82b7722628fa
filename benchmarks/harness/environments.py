"""An environment of its own for every peer, made once and kept."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from harness.jobs import Peer

_STAMP = "requirements.json"


def default_peers_dir() -> Path:
    """Return a folder in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "llmtuner-peers"


def prepare_environment(peer: Peer, peers_dir: Path) -> Path:
    """Return the interpreter of a peer; install its packages where they are not there yet.

    Packages come through pip (or uv, where it is installed) with the settings of the user:
    `PIP_EXTRA_INDEX_URL` (for uv `UV_INDEX`) can name an index with CPU builds of torch.
    """
    if not peer.requirements:
        return Path(sys.executable)
    folder = peers_dir / peer.name
    python = folder / "bin" / "python"
    if is_ready(folder, peer):
        return python
    print(f"Installing {peer.name} into {folder} (once)", flush=True)
    uses_uv = shutil.which("uv") is not None
    log = peers_dir / f"{peer.name}-install.log"
    peers_dir.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        for words in install_commands(peer, folder, uses_uv=uses_uv):
            done = subprocess.run(words, stdout=file, stderr=subprocess.STDOUT, check=False)
            if done.returncode != 0:
                raise SystemExit(f"Installing {peer.name} failed; see {log}")
    (folder / _STAMP).write_text(_requirements_text(peer), encoding="utf-8")
    return python


def is_ready(folder: Path, peer: Peer) -> bool:
    """Tell whether the packages were all installed, and are those that are asked for now."""
    stamp = folder / _STAMP
    return stamp.is_file() and stamp.read_text(encoding="utf-8") == _requirements_text(peer)


def install_commands(peer: Peer, folder: Path, *, uses_uv: bool) -> list[list[str]]:
    """Return the commands that make the environment of a peer."""
    python = str(folder / "bin" / "python")
    if uses_uv:
        make = ["uv", "venv", "--python", sys.executable, str(folder)]
        install = ["uv", "pip", "install", "--python", python]
    else:
        make = [sys.executable, "-m", "venv", str(folder)]
        install = [python, "-m", "pip", "install"]
    return [make, *([*install, *packages] for packages in peer.requirements)]


def _requirements_text(peer: Peer) -> str:
    return json.dumps(peer.requirements)
