"""Values are typed by their field, from a file and from the command line alike."""

import json

import pytest

CASES = [
    ("learning_rate", "2e-5", 2e-5),
    ("learning_rate", "1", 1.0),
    ("cutoff_len", "1e3", 1000),
    ("cutoff_len", "1_024", 1024),
    ("max_steps", "-1", -1),
    ("bf16", "yes", True),
    ("bf16", "Off", False),
    ("bf16", "null", None),
    ("plot_loss", "1", True),
    ("default_system", "off", "off"),
    ("default_system", "1e5", "1e5"),
    ("default_system", "12:30", "12:30"),
    ("default_system", "007", "007"),
    ("default_system", "none", "none"),
    ("default_system", "null", None),
    ("default_system", "None", None),
    ("default_system", "", None),
    ("max_samples", "none", None),
    ("quantization_bit", "4", 4),
    ("quantization_bit", "null", None),
    ("eval_strategy", "no", "no"),
    ("lora_target", "q_proj, v_proj", ("q_proj", "v_proj")),
    ("lora_target", "[q_proj, v_proj]", ("q_proj", "v_proj")),
    ("resume_from_checkpoint", "true", True),
    ("resume_from_checkpoint", "runs/checkpoint-10", "runs/checkpoint-10"),
    ("lr_scheduler_kwargs", "{num_cycles: 2, last: 0.5}", {"num_cycles": 2, "last": 0.5}),
    ("adam_beta2", "0.95", 0.95),
    ("label_names", "a,b", ("a", "b")),
    ("enable_thinking", "null", None),
    ("flash_attn", "fa2", "fa2"),
]


@pytest.mark.parametrize(("name", "text", "value"), CASES)
def test_flag_is_typed_by_its_field(train, name, text, value):
    found = train(f"--{name}", text).values()[name]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(("name", "text", "value"), CASES)
def test_key_value_is_typed_by_its_field(train, name, text, value):
    assert train(f"{name}={text}").values()[name] == value


@pytest.mark.parametrize(("name", "text", "value"), CASES)
def test_yaml_is_typed_by_its_field(train, write, name, text, value):
    found = train(write("a.yaml", f"{name}: {text}\n")).values()[name]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("learning_rate", 2e-05, 2e-5),
        ("learning_rate", "2e-5", 2e-5),
        ("bf16", True, True),
        ("max_samples", None, None),
        ("default_system", "null", "null"),
        ("default_system", "12", "12"),
        ("lora_target", ["a", "b"], ("a", "b")),
        ("lr_scheduler_kwargs", {"n": 2, "s": "2"}, {"n": 2, "s": "2"}),
        ("interleave_probs", None, None),
    ],
)
def test_json_is_typed_by_its_field(train, write, name, given, value):
    found = train(write("a.json", json.dumps({name: given}))).values()[name]
    assert found == value
    assert type(found) is type(value)


def test_yaml_keeps_text_that_yaml_1_1_would_change(train, write):
    path = write("a.yaml", "default_system: 答案: 是\ntemplate: on\nrun_name: 'null'\n")
    with pytest.raises(Exception, match=r"a\.yaml:1: Malformed YAML"):
        train(path)
    config = train(write("b.yaml", "default_system: '答案: 是'\ntemplate: on\nrun_name: 'null'\n"))
    assert config.data.default_system == "答案: 是"
    assert config.data.template == "on"
    assert config.train.run_name == "null"


def test_yaml_sequences_make_lists(train, write):
    config = train(write("a.yaml", "lora_target:\n- q_proj\n- v_proj\n"))
    assert config.lora.lora_target == ("q_proj", "v_proj")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lora_rank", "x"], "lora_rank must be a whole number. Got: 'x'."),
        (["--lora_rank", "2.5"], "lora_rank must be a whole number."),
        (["--lora_rank", "9" * 5000], "lora_rank must be"),
        (["--learning_rate", "nan"], "learning_rate must be a number."),
        (["--bf16=maybe"], "bf16 must be true or false."),
        (["--lora_rank", "null"], "lora_rank must be a whole number."),
        (["--lora_rank", "0"], "lora_rank is too small. Got: 0. Allowed: at least 1."),
        (["--lora_dropout", "1.5"], "lora_dropout is too large. Got: 1.5."),
        (["--finetuning_type", "lorra"], "did you mean lora?"),
        (["--lr_scheduler_type", "cosin"], "did you mean cosine?"),
        (["--optim", "adam"], "Unknown optim."),
        (["--quantization_bit", "16"], "Allowed: 4, 8."),
        (["--lr_scheduler_kwargs", "{a: "], "Malformed YAML"),
        (["--lr_scheduler_kwargs", "x"], "lr_scheduler_kwargs must be a mapping. Got: 'x'."),
        (["--gradient_checkpointing_kwargs", "x"], "must be a mapping. Got: 'x'."),
        (["lr_scheduler_kwargs=[1]"], "must be a mapping. Got"),
        (["--parallelism_config", "x"], "can only be set from Python code"),
        (["--lora_rank"], "lora_rank needs a value."),
    ],
)
def test_wrong_values_are_refused(refused, words, message):
    text = refused(*words)
    assert message in text
    assert len(text.splitlines()) == 1
