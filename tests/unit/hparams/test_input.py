"""Where values come from: file, flags and key=value, and which one wins."""

import json

import pytest

from llmtuner.hparams.parser import parse


def test_command_line_beats_file_and_the_last_word_wins(train, write):
    path = write("a.yaml", "lora_rank: 4\nlora_alpha: 4\nlora_dropout: 0.4\n")
    config = train(path, "--lora_rank", "5", "lora_alpha=5", "--lora_alpha", "6", "lora_rank=7")
    assert (config.lora.lora_rank, config.lora.lora_alpha) == (7, 6)
    assert config.lora.lora_dropout == 0.4


def test_the_file_may_stand_anywhere(train, write):
    path = write("a.yaml", "lora_rank: 4\n")
    assert train("--lora_rank", "5", path).lora.lora_rank == 5
    assert train("--plot_loss", path).lora.lora_rank == 4


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--plot_loss"], "plot_loss", True),
        (["--plot_loss", "True"], "plot_loss", True),
        (["--plot_loss=false"], "plot_loss", False),
        (["--no_double_quantization"], "double_quantization", False),
        (["--no-use-fast-tokenizer"], "use_fast_tokenizer", False),
        (["--no_use_cache"], "use_kv_cache", False),
        (["--no_cuda"], "use_cpu", True),
        (["--use-cpu"], "use_cpu", True),
        (["--local_rank=3"], "local_rank", 3),
        (["--local-rank", "3"], "local_rank", 3),
        (["--report_to", "wandb", "tensorboard"], "report_to", ("wandb", "tensorboard")),
        (["--resume_from_checkpoint"], "resume_from_checkpoint", True),
        (["--resume_from_checkpoint", "ckpt"], "resume_from_checkpoint", "ckpt"),
        (["--flash_attn"], "flash_attn", "auto"),
        (["--flash_attn", "False"], "flash_attn", "off"),
        (["--flash_attn", "disabled"], "flash_attn", "off"),
        (["--default_system="], "default_system", None),
        (["default_system=a=b"], "default_system", "a=b"),
        (["--default_system", "a b"], "default_system", "a b"),
    ],
)
def test_spellings(train, words, name, value):
    config = train(*words)
    assert config.values()[name] == value
    assert name in config.given


def test_a_bare_switch_leaves_the_next_word_alone(train):
    config = train("--plot_loss", "lora_rank=3", "--save_safetensors", "lora_alpha=5")
    assert (config.lora.lora_rank, config.lora.lora_alpha) == (3, 5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", "a.yaml:2: a is given twice (first in line 1)."),
        ("lora_rank: 1\nx: [1, 2\n", "a.yaml:3: Malformed YAML"),
        ("- a\n- b\n", "must hold `name: value` lines"),
        ("lora_rank: x\n", "a.yaml:1: lora_rank must be a whole number. Got: 'x'."),
        ("cutoff_len: 1\nmax_seq_length: 9\n", "a.yaml:2: max_seq_length and cutoff_len are the"),
        ("lora_rnk: 3\n", "a.yaml:1: Unknown option lora_rnk. Fix: did you mean lora_rank?"),
        ("a: &a [*a]\n", "nested too deeply"),
        ("a: &a 1\nb: &a 2\n", "An &anchor is defined twice"),
        ("lora_rank: !!python/name:os.system x\n", "lora_rank must be a whole number"),
        ("a: 1\n---\nb: 2\n", "Malformed YAML"),
    ],
)
def test_bad_yaml_is_one_located_line(refused, write, text, message):
    assert message in refused(write("a.yaml", text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"lora_rank": 1,\n "lora_rank": 2}', "lora_rank is given twice"),
        ('{"lora_rank": 1,\n', "a.json:2: Malformed JSON"),
        ("[1]", "must hold one object"),
        ('{"learning_rate": NaN}', "learning_rate must be a number"),
        ("[" * 5000, "nested too deeply"),
    ],
)
def test_bad_json_is_one_located_line(refused, write, text, message):
    assert message in refused(write("a.json", text))


def test_a_missing_file_and_a_second_file_are_named(refused, write):
    assert "no such file" in refused("gone.yaml")
    path = write("a.yaml", "lora_rank: 1\n")
    assert "Only one configuration file" in refused(path, "b.json")


def test_a_file_in_another_encoding_is_named(refused, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_bytes("default_system: 中医".encode("gb18030"))
    assert "not UTF-8" in refused(str(path))


def test_all_problems_are_reported_at_once(refused, write):
    path = write("a.yaml", "lora_rank: x\nlorra: 1\n")
    text = refused("stray", path, "--stage", "dpo", "--use_galore", "--fp16", "--bf16", base=False)
    for part in (
        "a.yaml:1: lora_rank",
        "a.yaml:2: Unknown option lorra",
        "stage dpo is not supported",
        "GaLore (use_galore) is not supported",
        "belongs to no flag",
        "fp16 and bf16 are both true",
        "model_name_or_path is missing",
        "output_dir is missing",
        "dataset is missing",
        "add --do_train",
    ):
        assert part in text
    assert len(text.splitlines()) == 10


def test_what_follows_from_an_unreadable_value_is_not_reported(refused):
    text = refused(
        "--model_name_or_path",
        "m",
        "--output_dir",
        "o",
        "--dataset",
        "d",
        "--do_train=perhaps",
        base=False,
    )
    assert text == "--do_train: do_train must be true or false. Got: 'perhaps'."


def test_options_of_other_commands_are_refused(refused):
    text = refused("--model_name_or_path", "m", "--do_train", command="chat", base=False)
    assert "do_train is an option of another command, not of chat." in text


def test_a_yaml_file_of_the_other_project_parses(write):
    text = """
### model
model_name_or_path: Qwen/Qwen3-1.7B
trust_remote_code: true

### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
deepspeed:

### dataset
dataset: identity,alpaca_en_demo  # in data/dataset_info.json
template: qwen3
cutoff_len: 2048
max_samples: 1000
preprocessing_num_workers: 16
dataloader_num_workers: 4

### output
output_dir: saves/qwen3/lora/sft
logging_steps: 10
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none  # choices: [none, wandb, tensorboard, swanlab, mlflow]

### train
per_device_train_batch_size: 1
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null
"""
    config = parse("train", [write("sft.yaml", text)])
    assert config.data.dataset == ("identity", "alpaca_en_demo")
    assert config.train.learning_rate == 1e-4
    assert (config.train.deepspeed, config.train.resume_from_checkpoint) == (None, None)
    assert config.train.other == {"dataloader_num_workers": 4}
    assert config.train.report_to == ("none",)


def test_the_written_config_asks_for_the_same_run(train, write):
    first = train("--lora_rank", "4", "--adam_beta1", "0.8", "--evaluation_strategy", "steps")
    again = parse("train", [write("run.json", json.dumps(first.to_dict()))])
    assert again.values() == first.values()
