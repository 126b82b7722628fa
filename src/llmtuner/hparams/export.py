"""Options of the export of a merged model."""

from typing import Literal

from pydantic.dataclasses import dataclass

from llmtuner.hparams.arg import CHECKED_WHEN_MADE, arg


@dataclass(frozen=True, kw_only=True, config=CHECKED_WHEN_MADE)
class ExportArgs:
    """Where and how the merged model is written."""

    export_dir: str | None = arg(None, "Folder for the merged model.")
    export_size: int = arg(5, "Largest weight file.", unit="GB", low=1)
    export_dtype: Literal["auto", "float32", "bfloat16", "float16"] = arg(
        "auto", "Number type of the weights; auto keeps the base's."
    )
    export_hub_model_id: str | None = arg(None, "Name on the hub to upload the result to.")
    export_hub_private: bool = arg(True, "Only you see what is uploaded.")
    export_quantization_bit: Literal[2, 3, 4, 8] | None = arg(
        None, "Quantise the merged model (GPTQ).", unit="bits"
    )
    export_quantization_dataset: str | None = arg(
        None, "Texts to calibrate the quantisation with: a data set, or a file."
    )
    export_quantization_nsamples: int = arg(128, "Texts of it to use.", unit="rows", low=1)
    export_quantization_maxlen: int = arg(1024, "Longest of these texts.", unit="tokens", low=2)
