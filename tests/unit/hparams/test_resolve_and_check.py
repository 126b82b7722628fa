"""Derived values are noted with their reason; contradictions are refused with a fix."""

import shlex

import pytest

from llmtuner.extras.errors import ConfigErrors
from llmtuner.hparams.parser import parse


def test_lora_alpha_is_twice_the_rank(train):
    config = train("--lora_rank", "12")
    assert config.lora.lora_alpha == 24
    assert "lora_alpha is 24: 2 x lora_rank, as it was not given." in config.notices
    assert train("--lora_alpha", "5").lora.lora_alpha == 5


@pytest.mark.parametrize("words", [["--eval_strategy", "epoch"], ["--do_eval"], ["--do_predict"]])
def test_evaluation_without_rows_holds_some_out(train, words):
    config = train(*words)
    assert config.data.val_size == 0.1
    assert any("holding out 10 % (seed 42)" in line for line in config.notices)


@pytest.mark.parametrize("words", [[], ["--do_eval", "--eval_dataset", "e"]])
def test_nothing_is_held_out_needlessly(train, words):
    assert train(*words).data.val_size == 0


def test_a_given_val_size_is_kept(train):
    assert train("--do_eval", "--val_size", "0.05").data.val_size == 0.05
    assert train("--do_eval", "--val_size", "3").data.val_size == 3


def test_evaluation_alone_evaluates_the_dataset():
    words = shlex.split("--model_name_or_path m --dataset a,b --output_dir o --do_eval")
    config = parse("train", words)
    assert config.data.eval_dataset == ("a", "b")
    assert config.data.val_size == 0


def test_evaluation_steps_follow_the_log(train):
    config = train("--eval_strategy", "steps", "--logging_steps", "7")
    assert config.train.eval_steps == 7
    assert config.train.do_eval


def test_predicting_generates(train):
    assert train("--do_predict").train.predict_with_generate


def test_trackers(train, refused):
    assert train("--use_swanlab").train.report_to == ("swanlab",)
    config = train("--report_to", "all")
    assert config.train.report_to == ("none",)
    assert any(line.startswith("report_to all has no effect") for line in config.notices)
    assert "Allowed: wandb, swanlab, tensorboard, none." in refused("--report_to", "mlflow")


def test_options_of_another_method_get_a_notice(train):
    config = train("--finetuning_type", "full", "--lora_rank", "4", "--lora_target", "all")
    assert "lora_rank has no effect: finetuning_type is full." in config.notices
    assert not any("lora_target" in line for line in config.notices)
    assert config.method is config.full


def test_reentrant_checkpointing_can_be_named_in_both_ways(train):
    config = train("--gradient_checkpointing_kwargs", '{"use_reentrant": false}')
    assert config.model.use_reentrant_gc is False


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--fp16 --bf16", "fp16 and bf16 are both true."),
        ("--fp16 --pure_bf16", "pure_bf16 and fp16 are both true."),
        ("--no_bf16 --pure_bf16", "pure_bf16 is true and bf16 is false."),
        (
            "--quantization_bit 4 --finetuning_type full",
            "Got: 'quantization_bit 4, finetuning_type full'. Fix: set finetuning_type lora",
        ),
        ("--finetuning_type freeze --adapter_name_or_path a", "adapter_name_or_path goes with"),
        ("--streaming", "streaming needs max_steps"),
        ("--streaming --max_steps 5 --val_size 0.1", "val_size as a count"),
        ("--streaming --max_steps 5 --do_eval", "val_size as a count"),
        ("--val_size 1", "val_size is no share of the rows"),
        ("--val_size 1.5", "val_size is no share of the rows"),
        ("--val_size 0.1 --eval_dataset e", "val_size and eval_dataset are both given."),
        ("--mask_history --train_on_prompt", "contradict each other"),
        ("--interleave_probs 1", "no meaning with mix_strategy concat"),
        ("--mix_strategy interleave_under --interleave_probs 0.5,0.5", "one share for each"),
        ("--dataset a,b --mix_strategy interleave_under --interleave_probs 0.5,0.6", "add up to 1"),
        ("--load_best_model_at_end", "load_best_model_at_end needs evaluation"),
        ("--early_stopping_steps 3", "early_stopping_steps needs evaluation"),
        ("--load_best_model_at_end --eval_strategy epoch", "set save_strategy epoch"),
        (
            "--load_best_model_at_end --eval_strategy steps --eval_steps 3 --save_steps 10",
            "multiple of eval_steps. Got: 'save_steps 10, eval_steps 3'.",
        ),
        (
            "--load_best_model_at_end --eval_strategy steps --eval_steps 10 --save_steps 5",
            "multiple of eval_steps",
        ),
        (
            "--load_best_model_at_end --eval_strategy steps --eval_steps 0.1 --save_steps 5",
            "multiple of eval_steps",
        ),
        ("--logging_steps 1.5", "logging_steps is no number of steps"),
        ("--logging_steps 0", "logging_steps must be above 0"),
        ("--gradient_checkpointing --disable_gradient_checkpointing", "are both true"),
        ("--deepspeed gone.json", "Cannot read the DeepSpeed file: no such file"),
    ],
)
def test_contradictions(refused, words, message):
    text = refused(*words.split())
    assert message in text
    assert len(text.splitlines()) == 1


def test_output_dir_must_not_be_a_file(refused, write):
    assert "output_dir is a file." in refused("--output_dir", write("taken", ""))


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("export", "--model_name_or_path m", "export_dir is missing."),
        ("export", "--export_dir e", "model_name_or_path is missing."),
        (
            "export",
            "--model_name_or_path m --export_dir e --quantization_bit 4",
            "cannot be merged into a quantised model",
        ),
        ("chat", "", "model_name_or_path is missing."),
        ("eval", "--model_name_or_path m", "task is missing."),
    ],
)
def test_other_commands_say_what_is_missing(refused, command, words, message):
    assert refused(*words.split(), command=command, base=False).startswith(message) or message in (
        refused(*words.split(), command=command, base=False)
    )


def test_the_command_lines_of_other_commands_parse():
    export = parse(
        "export",
        shlex.split(
            "--model_name_or_path m --adapter_name_or_path a,b --template qwen --export_size 2 "
            "--finetuning_type lora --export_dir e --export_device cpu --export_legacy_format False"
        ),
    )
    assert export.export.export_size == 2
    assert export.model.adapter_name_or_path == ("a", "b")
    benchmark = parse(
        "eval",
        shlex.split(
            "--model_name_or_path m --template fewshot --finetuning_type lora --task ceval "
            "--split validation --lang zh --n_shot 3 --batch_size 4"
        ),
    )
    assert (benchmark.evaluating.task, benchmark.data.split) == ("ceval", "validation")
    chat = parse("chat", ["--model_name_or_path", "m", "--temperature", "0.3", "--seed", "7"])
    assert (chat.generating.temperature, chat.train.seed) == (0.3, 7)


SECRETS = ("hf_hub_token", "ms_hub_token", "hub_token", "push_to_hub_token")


@pytest.mark.parametrize("name", SECRETS)
def test_secrets_are_never_shown(train, name):
    config = train(f"--{name}", "s3cret")
    assert "s3cret" in config.values().values()
    assert "s3cret" not in str(config.to_dict()) + repr(config) + str(config.notices)
    assert "***" in config.to_dict().values()


@pytest.mark.parametrize("name", [*SECRETS, "om_hub_token", "swanlab_lark_secret", "my_token"])
def test_secrets_are_in_no_message(write, name):
    path = write("a.yaml", f"{name}: [s3cret\nx: 1\n")
    attempts = (
        [f"--{name}", "s3cret", "--lora_rank", "x"],
        [f"--{name}", "a", "s3cret", "--lora_rank", "x"],
        [f"--{name}", "[s3cret", "--lora_rank", "x"],
        [path],
        [write("c.yaml", f"{name}: *s3cret\n")],
        [write("b.yaml", f"{name}:\n  s3cret: s3cret\nlora_rank: x\n")],
    )
    for words in attempts:
        with pytest.raises(ConfigErrors) as caught:
            parse("train", words)
        assert "s3cret" not in str(caught.value), words


@pytest.mark.parametrize(
    "words",
    [
        ("--torch_compile",),
        ("--torch_compile_backend", "eager"),
        ("--torch_compile_mode", "max-autotune-no-cudagraphs"),
    ],
)
def test_what_the_compiler_cannot_follow_is_turned_off_and_said(train, words):
    config = train(*words)
    assert not config.model.fast_kernels
    assert not config.model.use_reentrant_gc
    assert any(line.startswith("fast_kernels is false: torch_compile") for line in config.notices)
    assert any(line.startswith("use_reentrant_gc is false") for line in config.notices)


def test_without_the_compiler_nothing_is_turned_off(train):
    config = train("--torch_compile", "false")
    assert config.model.fast_kernels
    assert config.model.use_reentrant_gc
    assert not any("torch_compile" in line for line in config.notices)


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_compiling_for_one_shape_is_refused(refused, mode):
    text = refused("--torch_compile_mode", mode)
    assert "batches have many lengths" in text
    assert "max-autotune-no-cudagraphs" in text


def test_compiling_under_zero_3_is_refused(refused, train, write):
    file = write("ds3.json", '{"zero_optimization": {"stage": 3}}')
    assert "torch_compile does not go with ZeRO-3" in refused(
        "--deepspeed", file, "--torch_compile"
    )
    train("--deepspeed", file)
    file = write("ds2.json", '{"zero_optimization": {"stage": 2}}')
    train("--deepspeed", file, "--torch_compile")
