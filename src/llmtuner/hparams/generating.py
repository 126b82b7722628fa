"""Options of text generation."""

from pydantic.dataclasses import dataclass

from llmtuner.hparams.arg import CHECKED_WHEN_MADE, arg


@dataclass(frozen=True, kw_only=True, config=CHECKED_WHEN_MADE)
class GeneratingArgs:
    """How answers are drawn from the model."""

    do_sample: bool = arg(True, "Draw at random; false takes the likeliest token.")
    temperature: float = arg(0.95, "Above 1 is wilder, below 1 tamer.", low=0)
    top_p: float = arg(0.7, "Draw among the tokens that hold this share.", low=0, high=1)
    top_k: int = arg(50, "Draw among the k likeliest tokens; 0 for all.", low=0)
    num_beams: int = arg(1, "Beams of beam search; 1 for none.", low=1)
    max_length: int = arg(
        1024, "Longest prompt and answer together; max_new_tokens wins.", unit="tokens", low=1
    )
    max_new_tokens: int = arg(1024, "Longest answer.", unit="tokens", low=0)
    repetition_penalty: float = arg(1.0, "Above 1 repeats less.", low=0)
    length_penalty: float = arg(1.0, "Beam search: above 0 prefers longer answers.")
    skip_special_tokens: bool = arg(True, "Leave special tokens out of the answer.")
