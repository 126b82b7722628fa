"""A checkpoint says what is in it, every damage is found, and only our own old ones are removed."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_parts import FILES, RUN, make_store, manifest_of, save, write_files

from llmtuner.extras.errors import ModelError
from llmtuner.train.checkpoint import (
    MANIFEST,
    list_checkpoints,
    newest_valid_checkpoint,
    read_manifest,
    verify_checkpoint,
)


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushing to a real disk takes most of the time and changes nothing that is looked at."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def names(output_dir: Path) -> set[str]:
    return {path.name for path in output_dir.iterdir()}


def test_the_manifest_tells_run_step_identity_progress_and_every_file(tmp_path: Path) -> None:
    folder = save(make_store(tmp_path), 3)
    manifest = manifest_of(folder)
    files = manifest.pop("files")
    assert manifest == {
        "format_version": 1,
        "run_id": RUN,
        "step": 3,
        "identity": {"model_name_or_path": "m", "seed": 42},
        "progress": {"tokens_seen": 300},
    }
    assert files == {
        name: {"bytes": len(content) + 1, "sha256": hashlib.sha256(content + b"3").hexdigest()}
        for name, content in FILES.items()
    }


def test_a_checkpoint_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    with store.stage(1, {}) as folder:
        write_files(folder)
        assert list_checkpoints(tmp_path) == []
        assert not folder.name.startswith("checkpoint-")
    assert names(tmp_path) == {"checkpoint-1"}
    assert verify_checkpoint(tmp_path / "checkpoint-1") == []


def test_the_rename_is_the_last_change_and_everything_is_flushed_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def note_fsync(handle: int) -> None:
        calls.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def note_rename(path: Path, target: Path) -> Path:
        calls.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "rename", note_rename)
    save(make_store(tmp_path), 1)
    at = calls.index("rename")
    assert {Path(name).name for name in FILES} | {MANIFEST, "global_step1"} <= set(calls[:at])
    assert calls[at:] == ["rename", tmp_path.name]


def test_what_a_killed_save_left_does_not_get_into_the_next_one(tmp_path: Path) -> None:
    staging = tmp_path / f".staging-2-{RUN}"
    staging.mkdir()
    (staging / "half.safetensors").write_text("half")
    folder = save(make_store(tmp_path), 2)
    assert not (folder / "half.safetensors").exists()
    assert names(tmp_path) == {"checkpoint-2"}


def test_what_a_killed_save_of_another_step_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / f".staging-2-{RUN}").mkdir()
    save(make_store(tmp_path), 4)
    assert names(tmp_path) == {"checkpoint-4"}


def test_the_staging_folder_of_another_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".staging-2-other").mkdir()
    save(make_store(tmp_path), 2)
    assert names(tmp_path) == {"checkpoint-2", ".staging-2-other"}


def test_an_error_in_the_middle_of_a_save_passes_through_and_commits_nothing(
    tmp_path: Path,
) -> None:
    store = make_store(tmp_path)

    def fail_half_way() -> None:
        with store.stage(1, {}) as folder:
            write_files(folder)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_half_way()
    assert list_checkpoints(tmp_path) == []


def test_a_step_that_is_trained_again_replaces_its_checkpoint(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    save(store, 1)
    with store.stage(1, {"tokens_seen": 7}) as folder:
        (folder / "only").write_text("new")
    assert sorted(manifest_of(store.path_of(1))["files"]) == ["only"]
    assert verify_checkpoint(store.path_of(1)) == []
    assert names(tmp_path) == {"checkpoint-1"}


@pytest.mark.parametrize("manifest", [None, "", "[]", "null", "nonsense"])
def test_a_foreign_folder_in_the_way_is_moved_aside_and_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, manifest: str | None
) -> None:
    mine = tmp_path / "checkpoint-1"
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    if manifest is not None:
        (mine / MANIFEST).write_text(manifest)
    with caplog.at_level(logging.WARNING):
        save(make_store(tmp_path), 1)
    aside = tmp_path / f"before-{RUN}-checkpoint-1"
    assert (aside / "thesis.txt").read_text() == "mine"
    assert verify_checkpoint(mine) == []
    assert aside.name in caplog.text


def test_a_checkpoint_of_another_run_in_the_way_is_kept(tmp_path: Path) -> None:
    save(make_store(tmp_path, run_id="other"), 1)
    save(make_store(tmp_path), 1)
    ids = {manifest_of(path.parent)["run_id"] for path in tmp_path.glob(f"*/{MANIFEST}")}
    assert ids == {RUN, "other"}


def test_a_link_in_the_way_is_moved_and_its_target_is_untouched(tmp_path: Path) -> None:
    important = tmp_path / "important"
    important.mkdir()
    (important / "x").write_text("x")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "checkpoint-1").symlink_to(important)
    folder = save(make_store(tmp_path / "out"), 1)
    assert not folder.is_symlink()
    assert names(important) == {"x"}


# ---- damage (F12) ----


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    folder = save(make_store(tmp_path), 1)
    assert verify_checkpoint(folder) == []
    return folder


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(bytes(content))


def become_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def become_dead_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def append_byte(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"0")


def blank(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated to nothing": lambda path: cut(path, 0),
    "truncated to half": lambda path: cut(path, path.stat().st_size // 2),
    "one byte short": lambda path: cut(path, path.stat().st_size - 1),
    "one byte more": append_byte,
    "first bit": lambda path: flip(path, 0),
    "last bit": lambda path: flip(path, -1),
    "all zero": blank,
    "missing": Path.unlink,
    "a folder": become_folder,
    "a dead link": become_dead_link,
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_of_every_file_is_found_and_named(whole: Path, name: str, damage: str) -> None:
    DAMAGES[damage](whole / name)
    (problem,) = verify_checkpoint(whole)
    assert problem.startswith(str(whole / name))


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found_wherever_it_is(whole: Path, name: str) -> None:
    size = (whole / name).stat().st_size
    for offset in range(0, size, max(1, size // 20)):
        flip(whole / name, offset)
        assert len(verify_checkpoint(whole)) == 1, offset
        flip(whole / name, offset)
    assert verify_checkpoint(whole) == []


def test_two_swapped_files_are_found(whole: Path) -> None:
    first, second = (whole / name for name in list(FILES)[:2])
    content = first.read_bytes(), second.read_bytes()
    first.write_bytes(content[1])
    second.write_bytes(content[0])
    assert len(verify_checkpoint(whole)) == 2


def test_two_swapped_files_of_one_size_are_found(whole: Path, tmp_path: Path) -> None:
    other = save(make_store(tmp_path), 2)
    shutil.copy(other / "model.safetensors", whole / "model.safetensors")
    (problem,) = verify_checkpoint(whole)
    assert "sha256" in problem


def test_every_damaged_file_is_named(whole: Path) -> None:
    for name in FILES:
        (whole / name).unlink()
    assert len(verify_checkpoint(whole)) == len(FILES)


BAD_MANIFESTS = {
    "empty": b"",
    "object": b"{}",
    "array": b"[]",
    "null": b"null",
    "nan": b"NaN",
    "number": b"3",
    "text": b'"x"',
    "junk": b"\x80\x03\x00junk",
    "half": b'{"format_version": 1, "files": {',
    "no table": b'{"files": []}',
    "null table": b'{"files": null}',
    "deep": b"[" * 500,
}


@pytest.mark.parametrize("content", BAD_MANIFESTS.values(), ids=BAD_MANIFESTS.keys())
def test_a_replaced_manifest_is_found(whole: Path, content: bytes) -> None:
    (whole / MANIFEST).write_bytes(content)
    (problem,) = verify_checkpoint(whole)
    assert MANIFEST in problem


@pytest.mark.parametrize(
    "entry",
    [None, 5, [], {}, {"bytes": 1}, {"sha256": "x"}, "x"],
    ids=json.dumps,
)
def test_a_manifest_with_an_odd_entry_is_found(whole: Path, entry: object) -> None:
    manifest = manifest_of(whole)
    manifest["files"]["optimizer.pt"] = entry
    if isinstance(entry, dict) and "bytes" in entry:
        entry["bytes"] = (whole / "optimizer.pt").stat().st_size
    (whole / MANIFEST).write_text(json.dumps(manifest))
    assert verify_checkpoint(whole)


def test_a_manifest_that_lists_nothing_is_found(whole: Path) -> None:
    (whole / MANIFEST).write_text('{"files": {}}')
    assert verify_checkpoint(whole)


def test_a_flipped_bit_in_the_manifest_never_raises(whole: Path) -> None:
    size = (whole / MANIFEST).stat().st_size
    for offset in range(size):
        flip(whole / MANIFEST, offset)
        verify_checkpoint(whole)
        flip(whole / MANIFEST, offset)


def test_a_manifest_with_a_byte_order_mark_is_read(whole: Path) -> None:
    content = (whole / MANIFEST).read_bytes()
    (whole / MANIFEST).write_bytes(b"\xef\xbb\xbf" + content)
    assert verify_checkpoint(whole) == []


def test_stray_files_are_ignored(whole: Path) -> None:
    (whole / "notes.txt").write_text("mine")
    (whole / "more").mkdir()
    assert verify_checkpoint(whole) == []


def test_a_folder_that_is_not_there_is_no_checkpoint(tmp_path: Path) -> None:
    assert read_manifest(tmp_path / "checkpoint-1") is None
    assert len(verify_checkpoint(tmp_path / "checkpoint-1")) == 1


# ---- which one to resume ----


def test_checkpoints_are_listed_by_step_and_only_whole_numbers_count(tmp_path: Path) -> None:
    for name in ("10", "9", "100", "golden", "1a", "", "-3", "²", "٣", "5.5"):
        (tmp_path / f"checkpoint-{name}").mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    (tmp_path / "checkpoint-8").symlink_to(tmp_path / "checkpoint-9")
    assert [step for step, _ in list_checkpoints(tmp_path)] == [9, 10, 100]


def test_the_newest_is_the_one_with_the_highest_step_whatever_the_clock_says(
    tmp_path: Path,
) -> None:
    store = make_store(tmp_path)
    for age, step in enumerate((2, 10, 9)):
        os.utime(save(store, step), (1_000_000_000 - age, 1_000_000_000 - age))
    assert newest_valid_checkpoint(tmp_path, RUN) == store.path_of(10)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_is_reported_and_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    store = make_store(tmp_path)
    for step in (1, 2):
        save(store, step)
    DAMAGES[damage](store.path_of(2) / "optimizer.pt")
    with caplog.at_level(logging.WARNING):
        assert newest_valid_checkpoint(tmp_path, RUN) == store.path_of(1)
    assert str(store.path_of(2) / "optimizer.pt") in caplog.text
    assert store.path_of(2).is_dir()


def test_with_no_checkpoint_there_is_nothing_to_resume(tmp_path: Path) -> None:
    assert newest_valid_checkpoint(tmp_path, RUN) is None
    assert newest_valid_checkpoint(tmp_path, None) is None


def test_only_damaged_checkpoints_stop_and_every_damage_is_named(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    for step in (1, 2):
        (save(store, step) / "optimizer.pt").unlink()
    with pytest.raises(ModelError) as caught:
        newest_valid_checkpoint(tmp_path, RUN)
    assert all(f"checkpoint-{step}" in str(caught.value.got) for step in (1, 2))
    assert caught.value.exit_code == 4


def test_checkpoints_of_another_run_are_not_ours_to_resume(tmp_path: Path) -> None:
    save(make_store(tmp_path, run_id="other"), 9)
    assert newest_valid_checkpoint(tmp_path, RUN) is None
    ours = save(make_store(tmp_path), 2)
    assert newest_valid_checkpoint(tmp_path, RUN) == ours


def test_without_a_known_run_any_whole_checkpoint_will_do(tmp_path: Path) -> None:
    newest = save(make_store(tmp_path, run_id="other"), 9)
    save(make_store(tmp_path), 2)
    assert newest_valid_checkpoint(tmp_path, None) == newest


def test_a_checkpoint_without_a_readable_manifest_is_not_silently_passed_by(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ours = save(make_store(tmp_path), 2)
    (save(make_store(tmp_path), 3) / MANIFEST).write_text("")
    with caplog.at_level(logging.WARNING):
        assert newest_valid_checkpoint(tmp_path, RUN) == ours
    assert "checkpoint-3" in caplog.text


# ---- rotation (F09) ----


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        (None, None, {1, 2, 3, 4, 5}),
        (1, None, {5}),
        (2, None, {4, 5}),
        (3, None, {3, 4, 5}),
        (9, None, {1, 2, 3, 4, 5}),
        (1, 2, {2, 5}),
        (2, 1, {1, 4, 5}),
        (2, 5, {4, 5}),
        (3, 4, {3, 4, 5}),
    ],
)
def test_the_newest_and_the_best_stay(
    tmp_path: Path, keep: int | None, best: int | None, left: set[int]
) -> None:
    store = make_store(tmp_path, keep=keep)
    for step in range(1, 6):
        save(store, step)
    store.rotate(newest=5, best=best)
    assert {step for step, _ in list_checkpoints(tmp_path)} == left


def test_rotation_goes_by_step_not_by_time(tmp_path: Path) -> None:
    store = make_store(tmp_path, keep=2)
    for age, step in enumerate((9, 10, 11, 100)):
        os.utime(save(store, step), (1_000_000_000 - age, 1_000_000_000 - age))
    store.rotate(newest=100, best=None)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [11, 100]


def test_everything_foreign_is_untouched(tmp_path: Path) -> None:
    output_dir, important = tmp_path / "out", tmp_path / "important"
    store = make_store(output_dir, keep=1)
    save(make_store(output_dir, run_id="other"), 9999)
    save(make_store(output_dir, run_id="other"), 1)
    for folder in (output_dir / "checkpoint-golden", output_dir / "checkpoint-2", important):
        folder.mkdir()
        (folder / "x").write_text("mine")
    (output_dir / "checkpoint-5").symlink_to(important)
    for step in (3, 4, 6):
        save(store, step)
    store.rotate(newest=6, best=None)
    assert names(output_dir) == {
        "checkpoint-golden", "checkpoint-9999", "checkpoint-1", "checkpoint-2", "checkpoint-5",
        "checkpoint-6",
    }  # fmt: skip
    assert (important / "x").read_text() == "mine"
    assert verify_checkpoint(output_dir / "checkpoint-9999") == []


def test_a_link_to_an_own_checkpoint_is_no_second_checkpoint(tmp_path: Path) -> None:
    store = make_store(tmp_path, keep=1)
    save(store, 6)
    (tmp_path / "checkpoint-7").symlink_to(store.path_of(6))
    store.rotate(newest=6, best=None)
    assert names(tmp_path) == {"checkpoint-6", "checkpoint-7"}


def test_the_checkpoint_just_written_stays_beside_later_ones_of_the_same_run(
    tmp_path: Path,
) -> None:
    store = make_store(tmp_path, keep=1)
    for step in (10, 4):  # resumed from an early checkpoint: step 4 is the newer one
        save(store, step)
    store.rotate(newest=4, best=None)
    assert store.path_of(4).is_dir()


def test_only_rank_0_removes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(tmp_path, keep=1)
    for step in (1, 2):
        save(store, step)
    monkeypatch.setenv("RANK", "1")
    store.rotate(newest=2, best=None)
    assert names(tmp_path) == {"checkpoint-1", "checkpoint-2"}


def test_other_ranks_neither_clear_nor_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staging = tmp_path / f".staging-1-{RUN}"
    staging.mkdir()
    (staging / "of_rank_0").write_text("x")
    monkeypatch.setenv("RANK", "1")
    with make_store(tmp_path).stage(1, {}) as folder:
        assert folder == staging
    assert (staging / "of_rank_0").exists()
    assert list_checkpoints(tmp_path) == []
