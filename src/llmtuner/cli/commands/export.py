"""Merge adapters into the base model and write a folder that plain transformers loads."""

from collections.abc import Sequence

from llmtuner.cli.options import parse_or_help


def run(argv: Sequence[str]) -> int:
    """Parse, merge, write, and say what was written."""
    config = parse_or_help("export", argv)
    if config is None:
        return 0
    from llmtuner.data.template import load_template
    from llmtuner.model.export import export_model
    from llmtuner.model.tokenizer import load_tokenizer

    template = None
    if config.data.template is not None:
        template = load_template(
            config.data.template,
            load_tokenizer(config.model),
            default_system=config.data.default_system,
        )
    report = export_model(
        config.model,
        config.export,
        template_text=template.serving_text() if template else None,
        stop_ids=template.stop_ids if template else (),
    )
    print(
        f"Exported {report.num_parameters:,} parameters in {report.dtype} "
        f"({report.num_bytes / 1e6:.0f} MB in {report.num_files} files) to {report.export_dir}"
    )
    return 0
