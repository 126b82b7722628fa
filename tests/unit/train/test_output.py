"""What a run does with what it finds in its output folder: the whole table of decisions."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from checkpoint_parts import RUN, make_store, save

from llmtuner.extras.errors import ConfigError, LlmtunerError, ModelError, StorageError
from llmtuner.hparams.training import TrainArgs
from llmtuner.train.checkpoint import MANIFEST
from llmtuner.train.output import RUN_FILE, Start, check_output_dir


def args(output_dir: Path, **values: Any) -> TrainArgs:
    return TrainArgs(output_dir=str(output_dir), **{"do_train": True, **values})


def make_state(output_dir: Path, state: str) -> None:
    """Bring a folder into one of the states of the table."""
    for word in state.split():
        output_dir.mkdir(exist_ok=True)
        match word:
            case "finished" | "running" | "tokenized":
                run = {"status": word, "run_id": RUN}
                (output_dir / RUN_FILE).write_text(json.dumps(run))
            case "checkpoints":
                for step in (2, 4):
                    save(make_store(output_dir), step)
            case "damaged":
                for step in (2, 4):
                    (save(make_store(output_dir), step) / "optimizer.pt").unlink()
            case "others":
                save(make_store(output_dir, run_id="other"), 9)
            case "foreign":
                (output_dir / "thesis.txt").write_text("mine")
            case "empty" | "absent":
                pass
    if state == "absent":
        output_dir.rmdir()


NEW = None  # starts at step 0
TABLE: list[tuple[str, dict[str, Any], int | type[LlmtunerError] | None]] = [
    # state of the folder, options, what happens: a step to resume, NEW, or an error
    ("absent", {}, NEW),
    ("empty", {}, NEW),
    ("empty", {"resume_from_checkpoint": True}, ModelError),
    ("empty", {"resume_from_checkpoint": False}, NEW),
    ("empty", {"overwrite_output_dir": True}, NEW),
    ("empty", {"overwrite_output_dir": True, "resume_from_checkpoint": True}, ModelError),
    ("foreign", {}, ConfigError),
    ("foreign", {"overwrite_output_dir": True}, NEW),
    ("foreign", {"resume_from_checkpoint": False}, ConfigError),
    ("foreign", {"resume_from_checkpoint": True}, ModelError),
    ("running", {}, NEW),
    ("running", {"resume_from_checkpoint": True}, ModelError),
    ("running foreign", {}, NEW),
    ("running checkpoints", {}, 4),
    ("running checkpoints", {"resume_from_checkpoint": True}, 4),
    ("running checkpoints", {"resume_from_checkpoint": False}, NEW),
    ("running checkpoints", {"overwrite_output_dir": True}, NEW),
    ("running checkpoints", {"overwrite_output_dir": True, "resume_from_checkpoint": True}, 4),
    ("running checkpoints others", {}, 4),
    ("running others", {}, NEW),
    ("running others", {"resume_from_checkpoint": True}, ModelError),
    ("running damaged", {}, ModelError),
    ("running damaged", {"resume_from_checkpoint": True}, ModelError),
    ("running damaged", {"resume_from_checkpoint": False}, NEW),
    ("running damaged", {"overwrite_output_dir": True}, NEW),
    ("finished", {}, ConfigError),
    ("finished", {"resume_from_checkpoint": False}, ConfigError),
    ("finished", {"overwrite_output_dir": True}, NEW),
    ("finished", {"resume_from_checkpoint": True}, ModelError),
    ("finished checkpoints", {}, ConfigError),
    ("finished checkpoints", {"resume_from_checkpoint": True}, 4),
    ("finished checkpoints", {"overwrite_output_dir": True}, NEW),
    ("finished damaged", {"resume_from_checkpoint": True}, ModelError),
    ("checkpoints", {}, 4),
    ("checkpoints foreign", {}, 4),
    ("damaged", {}, ModelError),
]


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.mark.parametrize(
    ("state", "options", "expected"), TABLE, ids=[f"{state}, {opts}" for state, opts, _ in TABLE]
)
def test_the_folder_and_the_options_decide_how_a_run_starts(
    tmp_path: Path,
    state: str,
    options: dict[str, Any],
    expected: int | type[LlmtunerError] | None,
) -> None:
    output_dir = tmp_path / "out"
    make_state(output_dir, state)
    before = sorted(output_dir.rglob("*"))
    if isinstance(expected, type):
        with pytest.raises(expected) as caught:
            check_output_dir(args(output_dir, **options))
        assert type(caught.value) is expected
        assert str(output_dir) in str(caught.value)
    else:
        start = check_output_dir(args(output_dir, **options))
        if expected is NEW:
            assert start == Start(output_dir)
        else:
            assert start == Start(output_dir, output_dir / f"checkpoint-{expected}", RUN)
    assert sorted(output_dir.rglob("*")) == before  # looking changes nothing


def test_a_run_that_does_not_train_may_write_anywhere(tmp_path: Path) -> None:
    make_state(tmp_path, "finished")
    make_state(tmp_path, "foreign")
    assert check_output_dir(args(tmp_path, do_train=False)) == Start(tmp_path)


def test_the_message_of_a_foreign_folder_shows_what_is_in_it(tmp_path: Path) -> None:
    for number in range(9):
        (tmp_path / f"file{number}").write_text("")
    with pytest.raises(ConfigError) as caught:
        check_output_dir(args(tmp_path))
    assert caught.value.got == [f"file{number}" for number in range(5)]
    assert "--overwrite_output_dir" in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '"finished"'])
def test_a_run_file_that_says_nothing_is_as_good_as_none(tmp_path: Path, content: str) -> None:
    make_state(tmp_path, "checkpoints")
    (tmp_path / RUN_FILE).write_text(content)
    assert check_output_dir(args(tmp_path)).checkpoint == tmp_path / "checkpoint-4"


# ---- a checkpoint that is named ----


def test_a_named_checkpoint_is_taken_even_if_it_is_not_the_newest(tmp_path: Path) -> None:
    make_state(tmp_path, "finished")
    make_state(tmp_path, "checkpoints")
    wish = tmp_path / "checkpoint-2"
    start = check_output_dir(args(tmp_path, resume_from_checkpoint=str(wish)))
    assert start == Start(tmp_path, wish, RUN)


def test_a_checkpoint_of_another_folder_brings_its_run_along(tmp_path: Path) -> None:
    wish = save(make_store(tmp_path / "a", run_id="other"), 9)
    start = check_output_dir(args(tmp_path / "b", resume_from_checkpoint=str(wish)))
    assert start == Start(tmp_path / "b", wish, "other")


def test_a_named_checkpoint_that_is_not_there_is_refused(tmp_path: Path) -> None:
    wish = tmp_path / "checkpoint-7"
    with pytest.raises(ModelError, match="checkpoint-7: The checkpoint folder does not exist"):
        check_output_dir(args(tmp_path / "out", resume_from_checkpoint=str(wish)))


def test_a_named_checkpoint_that_is_damaged_is_refused(tmp_path: Path) -> None:
    wish = save(make_store(tmp_path), 9)
    (wish / "optimizer.pt").write_bytes(b"")
    with pytest.raises(ModelError, match=r"damaged.*optimizer\.pt has 0 bytes"):
        check_output_dir(args(tmp_path, resume_from_checkpoint=str(wish)))


def test_a_named_checkpoint_of_another_program_is_used_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wish = save(make_store(tmp_path), 9)
    (wish / MANIFEST).unlink()
    start = check_output_dir(args(tmp_path / "out", resume_from_checkpoint=str(wish)))
    assert start == Start(tmp_path / "out", wish, None)
    assert "cannot be verified" in caplog.text


# ---- a folder that cannot be written (F06) ----


def test_a_file_in_the_place_of_the_folder_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(StorageError, match="cannot be written: File exists"):
        check_output_dir(args(tmp_path / "out"))


@pytest.mark.parametrize("do_train", [True, False])
def test_a_folder_that_may_not_be_written_stops_the_run_before_anything_is_loaded(
    tmp_path: Path, do_train: bool
) -> None:
    output_dir = tmp_path / "out"
    output_dir.mkdir(mode=0o500)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            tmp_path.parent.parent.chmod(0o755)
            tmp_path.parent.chmod(0o755)
            tmp_path.chmod(0o755)
            os.setuid(65534)  # root may write anywhere
            check_output_dir(args(output_dir, do_train=do_train))
        except StorageError as error:
            code = 0 if "Permission denied" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
