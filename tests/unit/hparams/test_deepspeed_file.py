"""The DeepSpeed file and the flags: the file wins with a notice, precision must agree."""

import json

import pytest


@pytest.fixture
def deepspeed(write):
    def run(**values: object) -> list[str]:
        return ["--deepspeed", write("ds.json", json.dumps(values))]

    return run


def test_auto_changes_nothing(train, deepspeed):
    words = deepspeed(
        train_micro_batch_size_per_gpu="auto",
        bf16={"enabled": "auto"},
        zero_optimization={"stage": 2},
        optimizer={"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}},
    )
    config = train(*words, "--learning_rate", "1e-3")
    assert config.train.learning_rate == 1e-3
    assert not any("DeepSpeed" in line for line in config.notices)


def test_numbers_of_the_file_win_and_both_are_shown(train, deepspeed):
    words = deepspeed(
        train_micro_batch_size_per_gpu=2,
        gradient_clipping=0.5,
        optimizer={"type": "AdamW", "params": {"lr": 1e-4, "betas": [0.8, 0.9], "eps": 1e-6}},
    )
    config = train(*words, "--per_device_train_batch_size", "4", "--optim", "sgd")
    values = config.values()
    assert values["per_device_train_batch_size"] == 2
    assert isinstance(values["per_device_train_batch_size"], int)
    assert (values["max_grad_norm"], values["learning_rate"]) == (0.5, 1e-4)
    assert (values["adam_beta1"], values["adam_beta2"]) == (0.8, 0.9)
    assert config.train.other["adam_epsilon"] == 1e-6
    assert (
        "per_device_train_batch_size 4 and the DeepSpeed file's train_micro_batch_size_per_gpu 2 "
        "differ: the file wins." in config.notices
    )
    assert "learning_rate is 0.0001: the DeepSpeed file says optimizer.params.lr 0.0001." in (
        config.notices
    )
    assert "optim sgd and the DeepSpeed file's AdamW differ: the file wins." in config.notices


def test_the_schedule_of_the_file_wins(train, deepspeed):
    words = deepspeed(scheduler={"type": "WarmupDecayLR", "params": {"warmup_num_steps": 30}})
    config = train(*words, "--lr_scheduler_type", "cosine")
    assert config.train.lr_scheduler_type == "linear"
    assert config.train.warmup_steps == 30
    assert (
        "lr_scheduler_type cosine and the DeepSpeed file's scheduler WarmupDecayLR differ: "
        "the file wins." in config.notices
    )


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"bf16": {"enabled": True}}, ["--fp16"]),
        ({"bf16": {"enabled": True}}, ["--bf16", "false"]),
        ({"bf16": {"enabled": False}}, ["--bf16"]),
        ({"bf16": {"enabled": False}}, ["--pure_bf16"]),
        ({"fp16": {"enabled": True}}, ["--bf16"]),
        ({"fp16": {"enabled": False}}, ["--fp16"]),
    ],
)
def test_precision_must_agree(refused, deepspeed, section, words):
    text = refused(*deepspeed(**section), *words)
    assert text.count("ds.json: ") == len(text.splitlines()) == 1
    assert 'Fix: write "enabled": "auto" in the file.' in text


def test_precision_of_the_file_holds_where_no_flag_speaks(train, refused, deepspeed):
    assert train(*deepspeed(bf16={"enabled": True})).train.bf16 is True
    assert train(*deepspeed(bf16={"enabled": False})).train.bf16 is False
    config = train(*deepspeed(fp16={"enabled": True}))
    assert (config.train.fp16, config.train.bf16) == (True, False)
    both = deepspeed(fp16={"enabled": True}, bf16={"enabled": True})
    assert "turns on both bf16 and fp16" in refused(*both)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train_batch_size": 12}, "1 processes is 8"),
        ({"gradient_clipping": "1"}, "must be a number"),
        ({"scheduler": {"params": {"warmup_num_steps": 0}}}, "must be at least 1"),
        ({"scheduler": {"params": {"total_num_steps": 9}}}, "max_steps is -1"),
        (
            {
                "optimizer": {"params": {"lr": 1e-4}},
                "scheduler": {"params": {"warmup_max_lr": 1e-3}},
            },
            "differ.",
        ),
    ],
)
def test_what_cannot_work_is_refused(refused, deepspeed, values, message):
    text = refused(*deepspeed(**values))
    assert message in text
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "message"), [("{", "ds.json:1: Malformed JSON"), ("[1]", "must hold one object")]
)
def test_a_malformed_file_is_located(refused, write, text, message):
    assert message in refused("--deepspeed", write("ds.json", text))
