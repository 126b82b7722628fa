"""Benchmark files are found and read as people have them; damaged ones are named with the place."""

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_benchmark import HEADER, SUBJECTS, rows, write_benchmark, write_csv, zip_folder

from llmtuner.eval.benchmarks import BENCHMARKS
from llmtuner.eval.files import split_and_subject
from llmtuner.eval.sources import BenchmarkData, load_benchmark
from llmtuner.eval.task import find_task
from llmtuner.extras.errors import ConfigError, EvalError

ROOT = Path(__file__).parents[3]


def load(
    task_dir: Path, *, name: str = "ceval", split: str = "validation", **options
) -> BenchmarkData:
    options = {"num_shots": 5, **options}
    return load_benchmark(BENCHMARKS.get(name), task_dir, split=split, **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_benchmark(tmp_path / "tasks")


def as_flat(folder: Path) -> Path:
    target = folder.parent.parent / "flat"
    target.mkdir()
    for path in folder.rglob("*.csv"):
        shutil.copy(path, target)
    shutil.copy(folder / "mapping.json", target)
    return target


def as_parquet(folder: Path) -> Path:
    target = folder.parent.parent / "hub"
    for path in folder.rglob("*.csv"):
        subject, split = path.stem.split("_")
        table = rows(subject, split, len(path.read_text().splitlines()) - 1)
        found = {"question": [r[1] for r in table], "choices": [r[2:6] for r in table]}
        found["answer"] = ["ABCD".index(r[6]) for r in table]
        (target / subject).mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(found), target / subject / f"{split}-00000-of-00001.parquet")
    shutil.copy(folder / "mapping.json", target)
    return target


LAYOUTS = {
    "a folder per split": lambda folder: folder.parent,
    "the folder itself": lambda folder: folder,
    "flat": as_flat,
    "parquet of the hub": as_parquet,
    "a zip": lambda folder: zip_folder(folder, folder.parent.parent / "any.zip"),
    "a zip with a folder": lambda folder: zip_folder(folder.parent, folder.parents[1] / "any.zip"),
    "a zip beside": lambda folder: zip_folder(folder, folder.parent.parent / "ceval.zip").parent,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_questions(folder: Path, layout: str) -> None:
    expected = load(folder.parent)
    task_dir = LAYOUTS[layout](folder)
    if layout == "a zip beside":
        shutil.rmtree(folder.parent)
        (task_dir / "ceval_mapping.json").write_text(
            '{"anatomy": {"name": "Anatomy", '
            '"category": "STEM"}, "law": {"name": "Law", "category": "Social Sciences"}}'
        )
    found = load(task_dir)
    assert [(part.subject, len(part.shots)) for part in found.subjects] == [
        (part.subject, 5) for part in expected.subjects
    ]
    strip = [(q.index, q.text, q.choices, q.answer) for p in found.subjects for q in p.questions]
    assert strip == [
        (q.index, q.text, q.choices, q.answer) for p in expected.subjects for q in p.questions
    ]
    assert found.num_questions == found.num_labels == 14


def test_a_file_without_header_loses_no_row(tmp_path: Path) -> None:
    for header in ((), ("question", "A", "B", "C", "D", "answer")):
        folder = tmp_path / str(len(header)) / "mmlu"
        for split, count in (("dev", 5), ("val", 4)):
            table = [row[1:] for row in rows("anatomy", split, count)]
            write_csv(folder / split / f"anatomy_{split}.csv", table, header)
        (part,) = load(folder, name="mmlu").subjects
        assert part.questions[0].text == "anatomy val 0"
        assert (len(part.questions), len(part.shots)) == (4, 5)
        assert part.subject.category == "Other"


def test_cells_stay_text(tmp_path: Path) -> None:
    table = [["0", "1e5, 007", "NA", "None", "", "3.10", "a"]]
    for split in ("dev", "val"):
        write_csv(
            tmp_path / "ceval" / split / f"law_{split}.csv",
            table,
            ["", "Question", *HEADER[2:6], "Answer"],
        )
    (part,) = load(tmp_path, num_shots=1).subjects
    assert part.questions[0].choices == ("NA", "None", "", "3.10")
    assert part.questions[0].answer == "A"


def test_files_in_other_encodings(folder: Path) -> None:
    path = folder / "val" / "law_val.csv"
    text = "question,A,B,C,D,answer\n" + "诉讼时效一般是几年？,一年,两年,三年,四年,C\n" * 3
    found = {}
    for codec, told in (("utf-8", None), ("gb18030", None), ("utf-16", "utf-16")):
        path.write_text(text, encoding=codec)
        (part,) = load(folder, num_shots=0, wanted=("law",), encoding=told).subjects
        found[codec] = [(question.text, question.choices) for question in part.questions]
    assert found["utf-8"] == found["gb18030"] == found["utf-16"]


def test_a_split_without_labels(tmp_path: Path) -> None:
    write_benchmark(tmp_path, labels=False)
    found = load(tmp_path, split="test")
    assert (found.num_questions, found.num_labels) == (6, 0)
    assert found.missing == ("art",)


def test_subjects_are_chosen_in_the_order_of_the_map(folder: Path) -> None:
    found = load(folder, wanted=("law", "anatomy"))
    assert [part.subject.key for part in found.subjects] == ["anatomy", "law"]
    assert found.missing == ()


def shots(folder: Path, num_shots: int, seed: int | None) -> list[list[int]]:
    found = load(folder, num_shots=num_shots, seed=seed).subjects
    return [[shot.index for shot in part.shots] for part in found]


def test_examples_are_the_first_rows_or_those_that_the_seed_draws(folder: Path) -> None:
    assert shots(folder, 3, None) == [[0, 1, 2]] * 2
    drawn = [shots(folder, 3, seed) for seed in range(9)]
    assert drawn == [shots(folder, 3, seed) for seed in range(9)]
    assert len({tuple(rows) for both in drawn for rows in both}) > 5
    assert any(first != second for first, second in drawn)  # subjects draw apart
    assert shots(folder, 5, 7) == shots(folder, 5, None)
    alone = load(folder, num_shots=3, seed=4, wanted=("law",)).subjects[0]
    assert [shot.index for shot in alone.shots] == drawn[4][1]


HEAD = "id,question,A,B,C,D,answer\n"
DAMAGE = [
    ("val", "", "law_val.csv: The file is empty."),
    ("val", HEAD, "law_val.csv: The file holds no question."),
    ("val", "id,question,A,B,C,answer\n0,q,a,b,c,A\n", "law_val.csv:2: The question lacks d."),
    ("val", HEAD + "0,q,a,b,c,d,E\n", "law_val.csv:2: The answer is not one of the letters."),
    ("val", HEAD + "0, ,a,b,c,d,A\n", "law_val.csv:2: The question is empty."),
    ("val", HEAD + "0,q,a,b,c,d,A\n1,q,a,b,c,d,\n", "law_val.csv:3: The question has no answer"),
    ("val", HEAD + "0,q,a,b,c\n", "law_val.csv:2: The record has 5 cells"),
    ("val", HEAD + '0,"q,a,b,c,d,A\n', "law_val.csv:2: The file is not CSV"),
    ("dev", "id,question,A,B,C,D\n0,q,a,b,c,d\n", "law_dev.csv:2: An example has no answer."),
    ("mapping.json", "{", "mapping.json: The subject map cannot be read"),
    ("mapping.json", '{"law": {"category": "Arts"}}', "The subject 'law' is not described"),
    ("law_val.csv", "x", "Two files hold the validation questions of law."),
]


@pytest.mark.parametrize(("file", "text", "said"), DAMAGE)
@pytest.mark.parametrize("zipped", [False, True])
def test_damage_is_named_with_its_place(
    folder: Path, tmp_path: Path, file: str, text: str, said: str, zipped: bool
) -> None:
    path = folder / (file if "." in file else f"{file}/law_{file}.csv")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    task_dir = zip_folder(folder, tmp_path / "ceval.zip") if zipped else folder
    if said.startswith("law_"):
        said = f"{task_dir.name}/{file}/{said}"
    with pytest.raises(EvalError) as caught:
        load(task_dir)
    assert said in str(caught.value)
    assert str(task_dir) in str(caught.value)


def test_missing_files(folder: Path, tmp_path: Path) -> None:
    shutil.rmtree(folder / "dev")
    with pytest.raises(EvalError, match=r"has no dev file.*--n_shot 0"):
        load(folder)
    assert load(folder, num_shots=0).num_questions == 14
    with pytest.raises(EvalError, match="did you mean law"):
        load(folder, num_shots=0, wanted=("laws",))
    shutil.rmtree(folder / "test")
    with pytest.raises(EvalError, match=r"no test files.*Allowed: validation\."):
        load(folder, split="test")
    with pytest.raises(EvalError, match=r"are not there.*ceval/ceval-exam"):
        load(tmp_path / "nowhere")


def test_another_benchmark_beside_is_not_taken_for_this_one(tmp_path: Path) -> None:
    write_benchmark(tmp_path, name="mmlu")
    for path in (tmp_path / "mmlu").glob("*/*.csv"):
        shutil.copy(path, tmp_path / "mmlu")  # flat, too
    with pytest.raises(EvalError, match="are not there"):
        load(tmp_path)


def test_a_damaged_zip(folder: Path, tmp_path: Path) -> None:
    path = zip_folder(folder, tmp_path / "ceval.zip")
    data = bytearray(path.read_bytes())
    path.write_bytes(data[:-40])
    with pytest.raises(EvalError, match=r"ceval\.zip: The zip file cannot be read"):
        load(path)
    at = data.index(b"law_val.csv") + 30
    data[at : at + 20] = bytes(20)
    path.write_bytes(data)
    with pytest.raises(EvalError, match=r"val/law_val\.csv: The file cannot be taken out"):
        load(path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dev/law_dev.csv", ("dev", "law")),
        ("data/test/law.csv", ("test", "law")),
        ("a_b_val.csv", ("validation", "a_b")),
        ("law/val-00000-of-00002.parquet", ("validation", "law")),
        ("law/validation/0000.parquet", ("validation", "law")),
        ("__MACOSX/dev/law_dev.csv", None),
        ("dev/._law_dev.csv", None),
        ("data/auxiliary_train/x.csv", None),
        ("all/test-00000-of-00001.parquet", None),
        ("dev/readme.txt", None),
        ("law.csv", None),
    ],
)
def test_names_say_split_and_subject(name: str, expected: tuple[str, str] | None) -> None:
    assert split_and_subject(name) == expected


@pytest.mark.parametrize(
    ("name", "split", "expected"),
    [
        ("ceval", None, ("ceval", "validation")),
        ("mmlu_test", None, ("mmlu", "test")),
        ("mmlu_test", "test", ("mmlu", "test")),
        ("cmmlu", None, ("cmmlu", "test")),
        ("ceval", "val", ("ceval", "validation")),
    ],
)
def test_the_task_names_its_split(name: str, split: str | None, expected: tuple[str, str]) -> None:
    task = find_task(name, split)
    assert (task.benchmark.name, task.split) == expected


@pytest.mark.parametrize(
    ("name", "split", "said"),
    [
        ("cevl", None, "did you mean ceval"),
        ("mmlu_test", "validation", "different splits"),
        ("ceval", "train", "Allowed: validation, test"),
        ("cmmlu_val", None, "Allowed: test"),
        ("ceval_best", None, "did you mean ceval"),
    ],
)
def test_tasks_that_are_not(name: str, split: str | None, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        find_task(name, split)


def test_the_shipped_benchmark_is_whole() -> None:
    seen = set()
    for split, count in (("validation", 12), ("test", 4)):
        found = load(ROOT / "evaluation", name="medical", split=split)
        assert len(found.subjects) == 3
        assert found.missing == ()
        for part in found.subjects:
            assert (len(part.shots), len(part.questions)) == (5, count)
            for question in (*part.questions, *(part.shots if split == "test" else ())):
                assert len({*question.choices}) == 4
                assert all(choice == choice.strip() != "" for choice in question.choices)
                seen.add(question.text)
            letters = [question.answer for question in part.questions]
            assert {letters.count(letter) for letter in "ABCD"} == {count // 4}
    assert len(seen) == 3 * (5 + 12 + 4)


def test_subject_tables_have_known_sizes() -> None:
    sizes = {name: len(BENCHMARKS.get(name).subjects) for name in BENCHMARKS.names()}
    assert sizes == {"ceval": 52, "cmmlu": 67, "mmlu": 57, "medical": 0}
    assert SUBJECTS[0] in BENCHMARKS.get("mmlu").subjects
