"""Where the files of a benchmark are: a zip, a folder of tables, flat or with a folder per split.

Names say what a file holds: `val/anatomy_val.csv`, `test/anatomy.csv`, `anatomy_dev.csv`,
`anatomy/test-00000-of-00001.parquet`, `anatomy/val/0000.parquet`.
"""

import re
import shutil
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from llmtuner.eval.benchmark import SPLITS, Benchmark
from llmtuner.eval.benchmarks import BENCHMARKS
from llmtuner.extras.errors import EvalError

_SUFFIXES = (".csv", ".parquet", ".jsonl", ".json")
_SHARD = re.compile(r"-\d{5}-of-\d{5}\Z")
_SPLIT_SUFFIX = re.compile(r"(.+)_(dev|val|validation|test)\Z")
_IGNORED = re.compile(r"__MACOSX|auxiliary_train|all|\..*|_.*")  # of the hub's MMLU, and of zips
_MAX_MEMBER_BYTES = 1 << 28
_MAX_DEPTH = 3


@dataclass(frozen=True)
class TableFile:
    """One file of questions.

    Attributes:
        path: where it can be read.
        label: what messages call it; in a zip, `ceval.zip/val/physician_val.csv`.
    """

    path: Path
    label: str


@dataclass(frozen=True)
class Layout:
    """The files of a benchmark.

    Attributes:
        root: the folder or zip file.
        members: split -> subject -> names below the root, in order.
        mapping: the subject map in or beside it, if there is one: its name and its JSON.
    """

    root: Path
    members: Mapping[str, Mapping[str, tuple[str, ...]]]
    mapping: tuple[str, bytes] | None


def find_layout(benchmark: Benchmark, task_dir: Path) -> Layout:
    """Find the files of a benchmark below (or as) `--task_dir`.

    Raises:
        EvalError: there are none, or a zip file is damaged.
    """
    name = benchmark.name
    folder = task_dir / name
    candidates = [task_dir] if task_dir.suffix == ".zip" else []
    candidates += [folder, folder / f"{name}.zip", task_dir / f"{name}.zip", task_dir]
    for root in candidates:
        # Other benchmarks may lie side by side in the folder of all of them.
        others = BENCHMARKS.names() if root == task_dir and root.is_dir() else ()
        members = _members(root, max_depth=1 if others else _MAX_DEPTH, not_in=others)
        if members:
            return Layout(root, members, _mapping(root, folder, name))
    raise EvalError(
        f"The files of the benchmark {name} are not there.",
        where=f"--task_dir {task_dir}",
        got=_listing(task_dir),
        allowed=f"{folder} or {folder}.zip, with CSV or Parquet files such as "
        f"val/SUBJECT_val.csv and dev/SUBJECT_dev.csv",
        fix=f"get them from {benchmark.origin}, or name their folder",
    )


@contextmanager
def opened(layout: Layout, names: Iterable[str]) -> Iterator[dict[str, TableFile]]:
    """Make files readable meanwhile, which takes unpacking them where they are in a zip.

    Args:
        layout: from `find_layout`.
        names: of the files, as in its members.

    Yields:
        The files by name.

    Raises:
        EvalError: a member of the zip is damaged, encrypted or too large.
    """
    if layout.root.is_dir():
        yield {name: TableFile(layout.root / name, str(layout.root / name)) for name in names}
        return
    with TemporaryDirectory(prefix="llmtuner-") as folder:
        found = {}
        with zipfile.ZipFile(layout.root) as archive:
            for number, name in enumerate(names):
                target = Path(folder, f"{number}{PurePosixPath(name).suffix}")
                _extract(archive, name, target, label=f"{layout.root}/{name}")
                found[name] = TableFile(target, f"{layout.root}/{name}")
        yield found


def split_and_subject(name: str) -> tuple[str, str] | None:
    """Return what a file holds, by its name below the root; None if the name does not say it."""
    path = PurePosixPath(name)
    folders = [part for part in path.parts[:-1] if part not in ("data", path.root)]
    if path.suffix.lower() not in _SUFFIXES or any(map(_IGNORED.fullmatch, path.parts)):
        return None
    stem = _SHARD.sub("", path.stem)
    suffixed = _SPLIT_SUFFIX.match(stem)
    above = [part for part in folders if part in SPLITS]
    subjects = [part for part in folders if part not in SPLITS]
    if suffixed:
        return SPLITS[suffixed[2]], suffixed[1]
    if stem in SPLITS and subjects:
        return SPLITS[stem], subjects[-1]
    if above and stem.isdigit() and subjects:
        return SPLITS[above[-1]], subjects[-1]
    if above:
        return SPLITS[above[-1]], stem
    return None


def _mapping(root: Path, folder: Path, name: str) -> tuple[str, bytes] | None:
    inside = [path for path in _names(root) if PurePosixPath(path).name == "mapping.json"]
    if root.is_file() and inside:
        with zipfile.ZipFile(root) as archive:
            return f"{root}/{inside[0]}", archive.read(inside[0])
    beside = (root.with_name(f"{name}_mapping.json"), root.with_name("mapping.json"))
    for place in (root / "mapping.json", *beside, folder / "mapping.json"):
        if place.is_file():
            return str(place), place.read_bytes()
    return None


def _members(
    root: Path, *, max_depth: int, not_in: Sequence[str] = ()
) -> dict[str, dict[str, tuple[str, ...]]]:
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    for name in sorted(_names(root)):
        place = split_and_subject(name)
        folders = PurePosixPath(name).parts[:-1]
        if place is None or len(folders) > max_depth or {*folders}.intersection(not_in):
            continue
        split, subject = place
        earlier = found.setdefault(split, {}).get(subject, ())
        if earlier and not _SHARD.search(PurePosixPath(name).stem):
            raise EvalError(
                f"Two files hold the {split} questions of {subject}.",
                where=str(root),
                got=[*earlier, name],
                fix="keep one of them",
            )
        found[split][subject] = (*earlier, name)
    return found


def _names(root: Path) -> list[str]:
    if root.is_dir():
        found = [
            path for pattern in ("*", "*/*", "*/*/*", "*/*/*/*") for path in root.glob(pattern)
        ]
        return [path.relative_to(root).as_posix() for path in found if path.is_file()]
    if not root.is_file():
        return []
    try:
        with zipfile.ZipFile(root) as archive:
            return [info.filename for info in archive.infolist() if not info.is_dir()]
    except (zipfile.BadZipFile, OSError) as error:
        raise EvalError(
            f"The zip file cannot be read: {error}.",
            where=str(root),
            fix="download it again, it may have been cut short",
        ) from None


def _extract(archive: zipfile.ZipFile, name: str, target: Path, *, label: str) -> None:
    size = archive.getinfo(name).file_size
    if size > _MAX_MEMBER_BYTES:
        problem = "The file in the zip is too large for a benchmark."
        raise EvalError(problem, where=label, got=f"{size} bytes", fix="unpack it and look")
    try:
        with archive.open(name) as source, target.open("wb") as file:
            shutil.copyfileobj(source, file)
    except (zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError, EOFError) as error:
        raise EvalError(
            f"The file cannot be taken out of the zip: {error}.",
            where=label,
            fix="download the zip again, or unpack it yourself and name the folder",
        ) from None


def _listing(folder: Path) -> list[str] | str:
    if not folder.is_dir():
        return "a file" if folder.exists() else "no such folder"
    return sorted(path.name for path in folder.iterdir())[:20]
