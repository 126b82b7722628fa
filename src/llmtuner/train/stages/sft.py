"""Supervised fine-tuning: learn the assistant's turns of conversations."""

from llmtuner.data.build import build_datasets
from llmtuner.data.encoders.sft import PACKS_BY_DEFAULT, build_encoder
from llmtuner.data.packing import is_packed
from llmtuner.data.questions import load_question_sets
from llmtuner.data.verify import verify_datasets
from llmtuner.eval.metrics import check_libraries
from llmtuner.extras.errors import ConfigError
from llmtuner.hparams.config import RunConfig
from llmtuner.model.tokenizer import load_tokenizer
from llmtuner.train.output import check_output_dir
from llmtuner.train.predict import plan_room
from llmtuner.train.prepare import prepare_run
from llmtuner.train.report import RunReport, tokenized_report
from llmtuner.train.workflow import execute


def run(config: RunConfig) -> RunReport:
    """Check the output folder, prove and encode the data, load, train, evaluate, save, report."""
    if config.train.do_predict and config.data.train_on_prompt:
        raise ConfigError(
            "With train_on_prompt nothing tells the question from the answer when predicting.",
            where="--do_predict",
            fix="predict in a run of its own, without --train_on_prompt",
        )
    room = None
    if config.train.do_predict:
        check_libraries()  # before hours of training, not behind them
        config, room = plan_room(config)
    start = check_output_dir(config.train)
    tokenizer = load_tokenizer(config.model)
    encode = build_encoder(config.data, tokenizer)
    contract = verify_datasets(
        config.data,
        encode,
        num_rows=config.audit.verify_rows,
        trust_remote_code=config.model.trust_remote_code,
    )
    contract.check()
    data = build_datasets(
        config.data,
        encode=encode,
        seed=config.train.seed,
        packing=is_packed(config.data, by_default=PACKS_BY_DEFAULT),
        for_training=config.train.do_train,
        audit=config.audit,
    )
    if data.saved_to is not None:
        return tokenized_report(config, data)
    questions = {}
    if config.train.do_predict:
        questions = load_question_sets(config.data, encode, evals=data.evals, room=room)
    prepared = prepare_run(
        config,
        start=start,
        tokenizer=tokenizer,
        data=data,
        stop_ids=encode.template.stop_ids,
        contract=contract,
    )
    return execute(prepared, questions)
