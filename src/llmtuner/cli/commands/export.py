"""Merge adapters into the base model and write a folder that plain transformers loads."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmtuner.cli.options import parse_or_help
from llmtuner.extras.env import calm_blas

if TYPE_CHECKING:
    from llmtuner.hparams.config import RunConfig
    from llmtuner.model.export import ExportTexts


def run(argv: Sequence[str]) -> int:
    """Parse, merge, verify, write, and say what was written."""
    config = parse_or_help("export", argv)
    if config is None:
        return 0
    calm_blas()  # before numpy is imported
    from llmtuner.model.export import export_model

    if config.export.export_quantization_bit is not None:
        from llmtuner.inference.quantise_export import check_can_quantise

        check_can_quantise(config.export)
    report = export_model(
        config.model,
        config.export,
        texts=_texts(config),
        finish=lambda folder: _finish(folder, config),
    )
    print(
        f"Exported {report.num_parameters:,} parameters in {report.dtype} "
        f"({report.num_bytes / 1e6:.0f} MB in {report.num_files} files) to {report.export_dir}"
    )
    if config.export.export_hub_model_id is not None:
        from llmtuner.model.upload import upload_folder

        address = upload_folder(
            report.export_dir,
            config.export.export_hub_model_id,
            token=config.model.hf_hub_token,
            private=config.export.export_hub_private,
            where="export_hub_model_id",
        )
        print(f"Uploaded to {address}")
    return 0


def _finish(folder: Path, config: "RunConfig") -> None:
    """Do what needs the slow libraries, while the folder does not have its name yet."""
    if config.verifying.verify:
        _verify(folder, config)
    if config.export.export_quantization_bit is not None:
        from llmtuner.inference.quantise_export import quantise_export

        quantise_export(folder, config.export, config.data)


def _texts(config: "RunConfig") -> "ExportTexts":
    """Return what changes beside the weights; only a change needs the slow libraries."""
    from llmtuner.model.export import ExportTexts

    template_text, stop_ids, changes = None, (), {}
    if config.data.template is not None:
        from llmtuner.data.template import load_template
        from llmtuner.model.tokenizer import load_tokenizer

        template = load_template(
            config.data.template,
            load_tokenizer(config.model),
            default_system=config.data.default_system,
            enable_thinking=config.data.enable_thinking,
        )
        template_text, stop_ids = template.serving_text(), template.stop_ids
    if config.model.rope_scaling is not None:
        from llmtuner.model.load import load_config

        scaled = load_config(config.model).get_text_config().to_dict()
        changes = {
            name: scaled[name] for name in ("rope_parameters", "max_position_embeddings")
        } | {"rope_scaling": None}
    return ExportTexts(template_text, stop_ids, changes)


def _verify(folder: Path, config: "RunConfig") -> None:
    from llmtuner.inference.verify_export import verify_export

    report = verify_export(
        folder, config.model, config.data, num_prompts=config.verifying.verify_samples
    )
    ties = f", {report.num_near_ties} parted at a near tie" if report.num_near_ties else ""
    print(
        f"Verified: {report.num_weights} weights are the merged ones; on {report.num_prompts} "
        f"prompts the logits differ by at most {report.logit_difference:.1e} (allowed "
        f"{report.logit_bound:.0e}) and the greedy answers are the same{ties}; tokenizer, chat "
        "template and stop ids are those of the source."
    )
