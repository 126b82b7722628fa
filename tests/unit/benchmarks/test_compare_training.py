"""The parts of the peer benchmark that compute and write: no peer is needed."""

import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest
from harness.environments import install_commands, is_ready
from harness.jobs import OWN, Launch, Peer, Task, load_peers, select_contenders
from harness.machine import _processor, num_parameters
from harness.results import (
    Measured,
    Step,
    differing_steps,
    loss_distance,
    ratio,
    read_probes,
    summarise,
)
from harness.rows import num_packed_rows, read_alpaca, repeat_rows
from harness.runs import failure_reason
from harness.tables import agreement, figures_table, ratios_table


def steps(*seconds: float, tokens: int = 100, loss: float = 2.0) -> tuple[Step, ...]:
    return tuple(Step(s, 2 * s, tokens, 2 * tokens, tokens // 2, 4, loss) for s in seconds)


RUN = Measured(
    wall_s=60.0, begin_s=5.0, first_step_s=15.0, peak_bytes=3 * 10**9, steps=steps(10, 9, 1, 2, 3)
)
SLOW = replace(RUN, first_step_s=30.0, peak_bytes=6 * 10**9, steps=steps(10, 9, 3, 4, 5, loss=2.1))
FAILED = Measured(wall_s=1.0, failure="exit code 1: ValueError: no")


def figures(*runs: Measured, method: str = "lora"):
    return summarise(runs, method=method, parameters=10**9, gemm_flops=8e11)


def test_speeds_leave_out_the_first_steps():
    found = figures(RUN, FAILED)
    assert (found.samples_per_s, found.tokens_per_s, found.supervised_per_s) == (2, 50, 25)
    assert (found.step_s, found.step_cpu_s, found.begin_s, found.first_step_s) == (2, 4, 5, 15)
    assert found.flops == pytest.approx(4 * 1e9 * 50)
    assert found.peak_share == pytest.approx(0.25)
    assert figures(RUN, method="full").flops == pytest.approx(6 * 1e9 * 50)


def test_a_run_shorter_than_the_warm_up_counts_its_last_step():
    assert figures(replace(RUN, steps=steps(10, 5))).tokens_per_s == 20


def test_several_runs_give_their_median():
    runs = [replace(RUN, peak_bytes=size) for size in (1, 9, 2)]
    assert figures(*runs).peak_bytes == 2


def test_ratios_are_above_one_where_ours_is_better():
    found = ratio(figures(RUN), figures(SLOW))
    assert (found.samples, found.tokens, found.memory, found.start) == (2, 2, 2, 2)


def test_ranks_are_joined():
    def probe(seconds: float, loss: float) -> str:
        step = {
            "seconds": seconds,
            "cpu_seconds": 1,
            "loss": loss,
            "tokens": 3,
            "slots": 4,
            "supervised": 2,
        }
        values = {"begin_s": seconds, "first_step_s": 2 * seconds, "peak_bytes": 5, "versions": {}}
        return json.dumps({**values, "steps": [{**step, "samples": 1}]})

    found = read_probes([probe(1.0, 2.0), probe(3.0, 4.0)], wall_s=9.0)
    assert found.steps == (Step(3.0, 2, 6, 8, 4, 2, 3.0),)
    assert (found.begin_s, found.first_step_s, found.peak_bytes) == (3, 6, 10)
    empty = json.dumps({**json.loads(probe(1.0, 1.0)), "steps": []})
    assert "without" in read_probes([empty], wall_s=1.0).failure


def test_other_tokens_and_losses_are_seen():
    other = replace(RUN, steps=(*steps(1, 1), *steps(1, 1, tokens=90)))
    assert differing_steps(other, RUN) == [3, 4, 5]
    assert differing_steps(RUN, RUN) == []
    assert loss_distance(figures(SLOW), figures(RUN)) == pytest.approx(0.05)
    runs = {"llmtuner": RUN, "slow": SLOW, "other": other}
    values = {name: figures(run) for name, run in runs.items()}
    lines = agreement(runs, values, reference="llmtuner")
    assert lines[0] == "llmtuner: 5 steps, 500 tokens, 250 of them supervised"
    assert lines[1] == "slow: the same tokens; first loss 0.1000 apart, last ones 5.00 %"
    assert "steps [3, 4, 5]" in lines[2]


def test_tables():
    values = {"peer": figures(SLOW), "llmtuner": figures(RUN), "llmtuner, packed": figures(RUN)}
    table = figures_table(values, {"broken": "exit code 1: no"}).splitlines()
    assert table[2].startswith("| peer | 1.00 | 25 | 12 | 100 | 12 % | 4.00 | 8.00 |")
    assert table[-1] == "No figures from broken: exit code 1: no"
    own = ["llmtuner", "llmtuner, packed"]
    assert ratios_table(values, own=own).splitlines()[2:] == [
        "| peer | llmtuner | 2.00x | 2.00x | 2.00x | 2.00x |",
        "| llmtuner, packed | llmtuner | 1.00x | 1.00x | 1.00x | 1.00x |",
        "| peer | llmtuner, packed | 2.00x | 2.00x | 2.00x | 2.00x |",
    ]


def test_rows_start_over():
    assert repeat_rows([{"a": 1}, {"a": 2}], 3) == [{"a": 1}, {"a": 2}, {"a": 1}]
    assert num_packed_rows([30, 80], num_packs=2, capacity_tokens=90) == 4


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "Expecting"),
        ("[]", "a list of rows is needed"),
        ('[{"instruction": "a", "output": ""}]', "row 0 has no"),
        ('[{"instruction": "a", "output": "b", "system": "c"}]', "one turn"),
    ],
)
def test_unusable_rows_are_told(tmp_path, text, told):
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(SystemExit, match=told):
        read_alpaca(path)


@pytest.mark.parametrize(
    ("code", "lines", "reason"),
    [
        (124, ["anything"], "it took longer than --timeout allows"),
        (1, ["ValueError: bad", "  raise Error", "", "bye"], "exit code 1: ValueError: bad"),
        (1, ["starting", "Killed", ""], "exit code 1: Killed"),
        (1, [], "exit code 1: it said nothing"),
    ],
)
def test_the_reason_of_a_failure(code, lines, reason):
    assert failure_reason(lines, code=code) == reason


def test_an_environment_is_made_once_and_again_for_other_pins(tmp_path):
    peer = Peer(name="some", requirements=(("a==1",), ("b==2", "c==3")), contenders=())
    python = str(tmp_path / "bin" / "python")
    pip = install_commands(peer, tmp_path, uses_uv=False)
    assert pip[0][1:] == ["-m", "venv", str(tmp_path)]
    assert pip[1:] == [
        [python, "-m", "pip", "install", "a==1"],
        [python, "-m", "pip", "install", "b==2", "c==3"],
    ]
    assert install_commands(peer, tmp_path, uses_uv=True)[1][:5] == [
        *("uv", "pip", "install", "--python", python)
    ]
    assert not is_ready(tmp_path, peer)
    (tmp_path / "requirements.json").write_text('[["a==1"], ["b==2", "c==3"]]')
    assert is_ready(tmp_path, peer)
    assert not is_ready(tmp_path, replace(peer, requirements=(("a==2",),)))


def test_parameters_are_counted_from_the_headers(tmp_path):
    header = json.dumps({"__metadata__": {}, "w": {"shape": [3, 4]}, "b": {"shape": [5]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert num_parameters(tmp_path) == 17
    with pytest.raises(SystemExit, match="no weights"):
        num_parameters(tmp_path / "nowhere")


def test_the_processor_is_named():
    text = "model name : Some CPU\nflags : fpu avx512_bf16 amx_bf16\n"
    assert _processor(text) == "Some CPU (amx_bf16, avx512_bf16)"


def test_contenders_are_chosen_by_method_and_packing():
    peers = list(load_peers().values())
    assert peers[-1].name == OWN
    names = [one.name for _, one in select_contenders(peers, method="qlora", packing="off")]
    assert "llmtuner" in names
    assert not any("packed" in name or "TRL" in name or "DeepSpeed" in name for name in names)
    packed = select_contenders(peers, method="lora", packing="on")
    assert packed
    assert all(contender.packing for _, contender in packed)


PEERS = load_peers()
CONTENDERS = [
    pytest.param(contender, method, id=f"{contender.name}: {method}")
    for peer in PEERS.values()
    for contender in peer.contenders
    for method in contender.methods
]


@pytest.mark.parametrize(("contender", "method"), CONTENDERS)
def test_every_contender_gets_the_same_task(contender, method, tmp_path):
    task = Task(
        model=tmp_path / "model-7", data_dir=tmp_path / "rows-7", method=method,
        template="deepseek", steps=17, learning_rate=3e-5, seed=1234,
    )  # fmt: skip
    launch = Launch(python=Path("/env/bin/python"), task=task, output_dir=tmp_path)
    words = " ".join(contender.command(launch))
    if "settings.yaml" in words:
        words += (tmp_path / "settings.yaml").read_text()
    per_rank = task.batch_size // contender.ranks
    assert all(part in words for part in ("model-7", "rows-7", "17", "3e-05", "1234"))
    assert any(f"{mark}{per_rank}" in words for mark in ("batch_size ", 'batch_size": '))


@pytest.mark.parametrize("name", sorted(PEERS))
def test_pins_are_exact(name):
    packages = [package for group in PEERS[name].requirements for package in group]
    assert all("==" in package for package in packages)
    assert PEERS[name].environment is None or PEERS[PEERS[name].environment].requirements
