"""Pre-training: learn every token of plain texts."""

from llmtuner.data.build import build_datasets
from llmtuner.data.encoders.pt import PACKS_BY_DEFAULT, build_encoder
from llmtuner.data.packing import is_packed
from llmtuner.extras.errors import ConfigError
from llmtuner.hparams.config import RunConfig
from llmtuner.model.tokenizer import load_tokenizer
from llmtuner.train.output import check_output_dir
from llmtuner.train.prepare import prepare_run
from llmtuner.train.report import RunReport, tokenized_report
from llmtuner.train.workflow import execute


def run(config: RunConfig) -> RunReport:
    """Check the output folder, encode the data, load the model, train, evaluate, save, report."""
    if config.train.do_predict:
        raise ConfigError(
            "Predicting needs questions and answers, and stage pt reads plain texts.",
            where="--do_predict",
            fix="use --do_eval for the loss and perplexity",
        )
    start = check_output_dir(config.train)
    tokenizer = load_tokenizer(config.model)
    data = build_datasets(
        config.data,
        encode=build_encoder(config.data, tokenizer),
        seed=config.train.seed,
        packing=is_packed(config.data, by_default=PACKS_BY_DEFAULT),
        for_training=config.train.do_train,
        audit=config.audit,
    )
    if data.saved_to is not None:
        return tokenized_report(config, data)
    prepared = prepare_run(config, start=start, tokenizer=tokenizer, data=data, stop_ids=())
    return execute(prepared)
