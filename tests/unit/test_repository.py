"""The files around the package agree with it: data, examples, scripts, documents."""

import csv
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from llmtuner.cli.commands import COMMANDS
from llmtuner.data.conversation import Conversation
from llmtuner.data.dataset_info import load_dataset_specs
from llmtuner.data.records import BadRows
from llmtuner.data.rows import load_conversations
from llmtuner.hparams.data import DataArgs
from llmtuner.hparams.parser import parse

ROOT = Path(__file__).parents[2]
DATA = ROOT / "data"
DATA_SETS = json.loads((DATA / "dataset_info.json").read_text(encoding="utf-8"))
SCRIPTS = sorted([*ROOT.glob("*.sh"), *ROOT.glob("scripts/*.sh"), ROOT / ".ci" / "run"])
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("data/*.md")])
EXAMPLES = sorted(ROOT.glob("examples/**/*.yaml"))
# Data sets that the scripts of the document this project implements ask for by name.
NAMES_IN_SEED_SCRIPTS = {
    *("tcm_qa", "medical_instruction", "tcm_corpus", "medical_textbook", "clinical_notes"),
}
WRITTEN_BY_HAND = (".py", ".sh", ".md", ".json", ".jsonl", ".yaml", ".toml", ".txt", ".jinja")
NOT_OURS = (".git", ".venv", "models", "saves", "outputs", "output", "cache", "build", "dist")


def rows_of(path: Path) -> list[dict]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".csv":
        return list(csv.DictReader(text.splitlines()))
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines()]
    return json.loads(text)


def own_files() -> list[Path]:
    tops = [path for path in ROOT.iterdir() if path.name not in NOT_OURS]
    found = [path for top in tops for path in [top, *top.rglob("*")] if path.is_file()]
    return [path for path in found if path.suffix in WRITTEN_BY_HAND]


def test_data_sets_of_the_seed_scripts_exist():
    assert set(DATA_SETS) >= NAMES_IN_SEED_SCRIPTS


@pytest.mark.parametrize("name", DATA_SETS)
def test_data_set_has_whole_rows(name):
    rows = rows_of(DATA / DATA_SETS[name]["file_name"])
    assert len(rows) >= 8
    for row in rows:
        texts = [turn["value"] for turn in row.get("conversations", [])] or list(row.values())
        assert any(texts)
        assert all(text == text.strip() for text in texts)


def conversations_of(name: str, data_args: DataArgs) -> list[Conversation]:
    (spec,) = load_dataset_specs(data_args, [name])
    return list(load_conversations(spec, data_args=data_args, bad_rows=BadRows("error")))


@pytest.mark.parametrize("name", DATA_SETS)
def test_data_set_loads(name):
    found = conversations_of(name, DataArgs(dataset_dir=str(DATA)))
    assert len(found) == len(rows_of(DATA / DATA_SETS[name]["file_name"]))
    assert all(conversation.messages[-1].train for conversation in found)


def test_example_format_works(tmp_path):
    path = tmp_path / "visits.jsonl"
    path.write_text('{"patient": "It hurts.", "doctor": "Where?"}\n', encoding="utf-8")
    formats = str(ROOT / "examples" / "custom_formats")
    (found,) = conversations_of(str(path), DataArgs(custom_formats=formats))
    assert [message.content for message in found.messages] == ["It hurts.", "Where?"]


def test_no_question_is_answered_twice():
    rows = [*rows_of(DATA / "identity.json"), *rows_of(DATA / "tcm_alpaca.json")]
    questions = [(row["instruction"], row["input"]) for row in rows]
    assert len(questions) == len(set(questions))


def test_identity_answers_name_the_assistant_or_its_maker():
    names = ("Qihuang Assistant", "岐黄助手", "llmtuner")
    for row in rows_of(DATA / "identity.json"):
        assert any(name in row["output"] for name in names), row


def test_every_data_file_is_registered():
    registered = {entry["file_name"] for entry in DATA_SETS.values()}
    files = {path.name for path in DATA.iterdir() if path.suffix in (".json", ".jsonl", ".csv")}
    assert files - {"dataset_info.json"} == registered


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_parses(path):
    config = parse("train", [str(path)])
    assert config.train.do_train
    assert set(config.data.dataset) <= set(DATA_SETS)


@pytest.mark.parametrize(
    ("file", "stage"),
    [
        ("deepspeed_config.json", 2),
        ("configs/ds_z0.json", 0),
        ("configs/ds_z2.json", 2),
        ("configs/ds_z3.json", 3),
        ("configs/ds_z3_offload.json", 3),
    ],
)
def test_deepspeed_file_follows_the_flags(file, stage):
    config = json.loads((ROOT / file).read_text(encoding="utf-8"))
    assert config["zero_optimization"]["stage"] == stage
    assert config["train_micro_batch_size_per_gpu"] == config["gradient_clipping"] == "auto"
    assert config["bf16"]["enabled"] == config["fp16"]["enabled"] == "auto"
    # Optimizer and schedule come from the flags alone, so the file cannot contradict them.
    assert not {"optimizer", "scheduler"} & set(config)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_script_is_sound(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed; only the syntax was checked")
    command = ["shellcheck", "-x", str(path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("--output_dir a --bf16", "a"),
        ("--output_dir=a", "a"),
        ("--output-dir a", "a"),
        ("output_dir=a", "a"),
        ("--output_dir b --output_dir a", "a"),
        ("--output_dirs b output_dir", "unset"),
    ],
)
def test_run_scripts_see_appended_flags(words, value):
    command = f"source scripts/launch.sh; flag_value output_dir unset {words}"
    result = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == f"{value}\n"


@pytest.mark.parametrize("path", [*SCRIPTS, *DOCUMENTS], ids=lambda path: path.name)
def test_named_commands_and_scripts_exist(path):
    text = path.read_text(encoding="utf-8")
    commands = re.findall(r"(?:^|[`$(\s])llmtuner ([a-z][a-z-]+) +(?:-|\"|[a-z/]+\.yaml)", text)
    assert set(commands) <= {name.replace("_", "-") for name in COMMANDS.names()}
    scripts = re.findall(r"bash (?:\"?\$\w+/)?([\w/]+\.sh)", text)
    assert not [name for name in scripts if not (ROOT / name).is_file()]


def test_readme_tree_is_true():
    tree = (ROOT / "README.md").read_text(encoding="utf-8").split("```text\n")[1].split("```")[0]
    names = [line.split()[0] for line in tree.splitlines()]
    assert len(names) > 10
    assert not [name for name in names if not (ROOT / name).exists()]


def test_links_between_documents_lead_somewhere():
    broken = []
    for path in DOCUMENTS:
        for target in re.findall(r"\]\((?!http)([^)#]+)", path.read_text(encoding="utf-8")):
            if not (path.parent / target).exists():
                broken.append(f"{path.name}: {target}")
    assert not broken


def test_no_path_of_the_machine_it_was_written_on():
    machine_path = re.compile(r"(?<![\w.-])/(?:work|root|home/\w+)/")
    found = [
        str(path.relative_to(ROOT))
        for path in own_files()
        if machine_path.search(path.read_text(encoding="utf-8"))
    ]
    assert found == []


def test_machine_paths_are_searched_in_many_files():
    assert len(own_files()) > 60
