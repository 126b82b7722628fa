"""What every stage does with a prepared run: train, evaluate, predict, save, report."""

import time
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from llmtuner.data.questions import QuestionSet
from llmtuner.extras.dist import barrier
from llmtuner.extras.env import process_env
from llmtuner.extras.logs import get_logger
from llmtuner.extras.memory import keep_freed_memory
from llmtuner.train.answer_journal import discard_journals
from llmtuner.train.checkpoint import read_manifest
from llmtuner.train.companions import check_companions
from llmtuner.train.output import clear_results
from llmtuner.train.plan.record import add_actual
from llmtuner.train.predict import predictions_file, summarise
from llmtuner.train.prepare import Run
from llmtuner.train.push import push_result
from llmtuner.train.report import RunReport, write_model_card, write_results

logger = get_logger(__name__)


def execute(run: Run, questions: Mapping[str, QuestionSet] = MappingProxyType({})) -> RunReport:
    """Train, evaluate and predict as asked, save the result, and write everything down.

    Args:
        run: what the stage has prepared.
        questions: what to predict, by the names of the evaluation sets.
    """
    config, trainer = run.config, run.trainer
    barrier()  # every rank has looked at the output folder before rank 0 changes it
    if _is_main():
        if config.train.do_train and run.start.checkpoint is None:
            clear_results(run.start.output_dir)
        run.report.write()
    metrics: dict[str, Any] = {}
    if config.train.do_train:
        metrics |= _train(run)
    if config.train.do_eval:
        results = _last_evaluation(run) or trainer.evaluate()
        metrics |= results
        if _is_main():
            write_results(run.start.output_dir, "eval", results)
    if config.train.do_predict:
        metrics |= _predict(run, questions)
    for tracker in run.trackers:
        tracker.close()
    seconds = round(time.monotonic() - run.started, 3)
    plan = add_actual(run.report.plan, run.clock, device_type=trainer.args.device.type)
    report = replace(run.report, status="finished", plan=plan, metrics=metrics, wall_time_s=seconds)
    if _is_main():
        if config.finetuning.plot_loss:
            from llmtuner.train.plots import plot_losses  # only now: drawing loads slowly

            plot_losses(trainer.state.log_history, run.start.output_dir)
        if config.train.do_train:
            write_model_card(report)
        report.write()
        if config.train.push_to_hub:
            logger.info("Uploaded to %s.", push_result(run.start.output_dir, config.train))
    barrier()
    return report


def _train(run: Run) -> dict[str, Any]:
    trainer, output_dir = run.trainer, run.start.output_dir
    if run.start.checkpoint is not None:
        progress = (read_manifest(run.start.checkpoint) or {}).get("progress", {})
        trainer.supervised_tokens_seen = progress.get("supervised_tokens_seen", 0)
        trainer.tokens_seen_before = progress.get("tokens_seen", 0)
    checkpoint = str(run.start.checkpoint) if run.start.checkpoint else None
    if trainer.args.device.type == "cpu":
        keep_freed_memory()
    result = trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.cache is not None:
        trainer.cache.close()
    trainer.save_model(str(output_dir))
    if _is_main() and run.report.contract:
        check_companions(output_dir, run.report.contract["digest"], config=run.config.model)
    tokens_now = trainer.state.num_input_tokens_seen - trainer.tokens_seen_before
    metrics = {
        **result.metrics,
        "train_tokens_seen": trainer.state.num_input_tokens_seen,
        "train_supervised_tokens_seen": trainer.supervised_tokens_seen,
        "train_tokens_per_second": round(tokens_now / result.metrics["train_runtime"], 3),
    }
    if _is_main():
        write_results(output_dir, "train", metrics)
        trainer.state.save_to_json(str(output_dir / "trainer_state.json"))
    return metrics


def _last_evaluation(run: Run) -> dict[str, Any] | None:
    """Return the metrics of the last step if it was evaluated and its weights are still there."""
    state = run.trainer.state
    if not run.config.train.do_train or run.config.train.load_best_model_at_end:
        return None
    for entry in reversed(state.log_history):
        if entry["step"] == state.global_step and "eval_loss" in entry:
            return {name: value for name, value in entry.items() if name != "step"}
    return None


def _predict(run: Run, questions: Mapping[str, QuestionSet]) -> dict[str, Any]:
    output_dir = run.start.output_dir
    sets = {
        name: run.predict(
            asked,
            path=predictions_file(output_dir, name),
            seed=run.config.train.seed,
            number_type=run.report.model["precision"],
        )
        for name, asked in questions.items()
    }
    results = summarise(sets)
    if _is_main():
        write_results(output_dir, "predict", results)
        discard_journals(output_dir)
    return results


def _is_main() -> bool:
    return process_env().rank == 0
