"""Every name of LLaMA-Factory and of transformers is known; what is refused says what to use."""

import ast
import importlib.util
import json
import shlex
from pathlib import Path

import pytest

from llmtuner.hparams.aliases import load_aliases
from llmtuner.hparams.options import all_options, options_of
from llmtuner.hparams.parser import parse
from llmtuner.hparams.refused import refusals, refused_values

HERE = Path(__file__).parent
ROOT = HERE.parents[2]


def names_in(file: str) -> list[str]:
    lines = (HERE / file).read_text(encoding="utf-8").splitlines()
    return [line.partition(" = ")[0] for line in lines if not line.startswith("#")]


def hf_table():
    return json.loads((ROOT / "src/llmtuner/hparams/hf_training_args.json").read_text())


def known() -> set[str]:
    return {*all_options(), *load_aliases().names(), *refusals()}


@pytest.mark.parametrize("file", ["llamafactory_flags.txt", "transformers_4_41_arguments.txt"])
def test_every_upstream_name_is_known(file):
    names = names_in(file)
    assert len(names) > 100
    assert sorted(set(names) - known()) == []


def test_every_argument_of_the_installed_transformers_is_taken():
    taken = {*options_of("train"), *load_aliases().names()}
    assert hf_table().keys() - taken == set()


def test_the_table_has_the_names_and_defaults_of_the_installed_transformers():
    package = Path(importlib.util.find_spec("transformers").submodule_search_locations[0])
    found = {}
    for file in ("training_args.py", "training_args_seq2seq.py"):
        for owner in ast.parse((package / file).read_text(encoding="utf-8")).body:
            if isinstance(owner, ast.ClassDef) and owner.name.endswith("TrainingArguments"):
                lines = [node for node in owner.body if isinstance(node, ast.AnnAssign)]
                found |= {line.target.id: line.value for line in lines}
    table = hf_table()
    public = {name: value for name, value in found.items() if not name.startswith("_")}
    assert table.keys() == public.keys()
    for name, value in public.items():
        words = {word.arg: word.value for word in value.keywords}
        if isinstance(words.get("default"), ast.Constant):
            assert table[name]["default"] == words["default"].value, name


@pytest.mark.slow
def test_the_table_equals_what_the_tool_writes():
    spec = importlib.util.spec_from_file_location("tool", ROOT / "tools/generate_hf_args.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert tool.TABLE.read_text(encoding="utf-8") == tool.render_table(), (
        "run python tools/generate_hf_args.py"
    )


def test_our_defaults_are_those_of_transformers():
    table = hf_table()
    ours = {"bf16": None, "report_to": ("none",)}
    for name, option in options_of("train").items():
        if option.group == "train" and name in table:
            assert option.default == ours.get(name, table[name]["default"]), name


def test_our_defaults_are_those_of_llamafactory():
    lines = (HERE / "llamafactory_flags.txt").read_text(encoding="utf-8").splitlines()
    theirs = dict(line.split(" = ") for line in lines if " = " in line)
    compared = 0
    for name, option in all_options().items():
        literal = theirs.get(name, "REQUIRED")
        is_enum_member = literal[0].isupper() and "." in literal
        if name != "swanlab_project" and literal != "REQUIRED" and not is_enum_member:
            default = ast.literal_eval(literal)
            ours = ",".join(option.default) if isinstance(option.default, tuple) else option.default
            assert ours == default, name
            compared += 1
    assert compared > 80


def test_aliases_lead_to_options_and_hide_none():
    table = load_aliases()
    targets = {table.target(name) for name in table.names() - table.when_true.keys()}
    targets -= table.ignored.keys()
    targets |= {name for name, _ in table.when_true.values()}
    assert targets <= set(all_options())
    assert not set(refusals()) & ({*all_options()} | table.names())


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("--evaluation_strategy steps", "eval_strategy", "steps"),
        ("--max_seq_length 2048", "cutoff_len", 2048),
        ("--max_sequence_len 2048", "cutoff_len", 2048),
        ("--max_length 77", "max_length", 77),
        ("--use_cache false", "use_kv_cache", False),
        ("--checkpoint_dir a,b", "adapter_name_or_path", ("a", "b")),
        ("--system_prompt hi", "default_system", "hi"),
        ("--neft_alpha 5", "neftune_noise_alpha", 5.0),
        ("--sft_packing", "packing", True),
        ("--cache_path p", "tokenized_path", "p"),
        (
            "--finetuning_type freeze --name_module_trainable mlp",
            "freeze_trainable_modules",
            ("mlp",),
        ),
        ("--finetuning_type freeze --num_layer_trainable 3", "freeze_trainable_layers", 3),
        ("--new_special_tokens <a>,<b>", "add_special_tokens", ("<a>", "<b>")),
        ("--resume_lora_training false", "create_new_adapter", True),
        ("--resume_lora_training true", "create_new_adapter", False),
        ("--warmup_ratio 0.1", "warmup_steps", 0.1),
        ("--group_by_length", "train_sampling_strategy", "group_by_length"),
        ("--adafactor", "optim", "adafactor"),
        ("--optim adamw_hf", "optim", "adamw_torch"),
        ("--include_inputs_for_metrics", "include_for_metrics", ("inputs",)),
        ("--per_gpu_train_batch_size 3", "per_device_train_batch_size", 3),
        ("--push_to_hub_model_id x", "hub_model_id", "x"),
        ("--include_num_input_tokens_seen true", "include_num_input_tokens_seen", "all"),
        ("--quantization_method bitsandbytes", "quantization_method", "bnb"),
        ("--activation_checkpointing", "gradient_checkpointing", True),
        ("--ppo_logger wandb", "report_to", ("wandb",)),
    ],
)
def test_old_spellings(train, words, name, value):
    config = train(*words.split())
    assert config.values()[name] == value
    old = [word.removeprefix("--") for word in words.split() if word.startswith("--")][-1]
    assert any(notice.startswith(old) for notice in config.notices) or old == name


@pytest.mark.parametrize("name", sorted(load_aliases().ignored))
def test_names_without_meaning_are_accepted_with_one_notice(train, name):
    config = train(f"--{name}")
    assert [line for line in config.notices if line.startswith(f"{name} has no effect")]


@pytest.mark.parametrize("name", sorted(refusals()))
def test_refused_names_say_what_to_use(train, refused, name):
    text = refused(f"--{name}", "something-else")
    assert f"({name}) is not supported. Fix: " in text
    assert "something-else" not in text
    inert = refusals()[name].inert
    for value in [inert] if isinstance(inert, str) or inert is None else inert:
        config = train(f"--{name}", "null" if value is None else value)
        assert name not in config.values()


@pytest.mark.parametrize(
    ("name", "value"), [(n, v) for n, values in refused_values().items() for v in values]
)
def test_refused_values_say_what_to_use(refused, name, value):
    text = refused(f"--{name}", value)
    assert text.startswith(f"--{name}: {name} {value} is not supported. Fix: ")


def test_warmup_ratio_beside_warmup_steps(train, refused):
    assert train("--warmup_steps", "20", "--warmup_ratio", "0.1").train.warmup_steps == 20
    assert train("--warmup_steps", "0", "--warmup_ratio", "0.1").train.warmup_steps == 0.1
    assert "warmup_ratio is too large" in refused("--warmup_ratio", "2")


def test_scripts_of_the_shuzhiqihuang_project_parse():
    words = shlex.split(
        "--stage sft --model_name_or_path m --do_train --template qwen "
        "--dataset_dir data --dataset a,b --finetuning_type lora --lora_target q_proj,v_proj "
        "--lora_rank 64 --lora_alpha 128 --lora_dropout 0.05 --output_dir o --cache_dir c "
        "--per_device_train_batch_size 4 --per_device_eval_batch_size 4 "
        "--gradient_accumulation_steps 8 --lr_scheduler_type cosine --logging_steps 10 "
        "--preprocessing_num_workers 8 --save_steps 500 --learning_rate 5e-5 "
        "--num_train_epochs 3.0 --max_samples 100 --evaluation_strategy steps --eval_steps 500 "
        "--max_grad_norm 1.0 --warmup_steps 100 --weight_decay 0.01 --plot_loss "
        "--overwrite_output_dir --bf16 --save_safetensors --report_to none --max_seq_length 2048"
    )
    config = parse("train", words)
    assert config.lora.lora_target == ("q_proj", "v_proj")
    assert config.data.val_size == 0.1
    assert config.data.cutoff_len == 2048
    values = config.train.hf_values()
    assert values["warmup_steps"] == 100
    assert values["report_to"] == "none"
    assert values.keys() <= hf_table().keys()
    assert not values.keys() & {"bf16", "fp16", "resume_from_checkpoint", "save_total_limit"}
    assert not values.keys() & {"predict_with_generate", "local_rank", "gradient_checkpointing"}
