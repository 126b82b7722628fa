"""Proof that an exported model is its base with its adapters, done by other means than the export.

The export computes with numpy. Here transformers loads the result, peft puts the adapters on the
base, and both answer the same prompts in float32: their logits and greedy answers must agree, and
so must every weight, tokenizer, chat template and stop id.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from llmtuner.data.tokenizer_digest import tokenizer_digest
from llmtuner.extras.errors import ModelError
from llmtuner.extras.logs import get_logger
from llmtuner.hparams.data import DataArgs
from llmtuner.hparams.model import ModelArgs
from llmtuner.inference.export_prompts import (
    ProbePrompt,
    load_chat_template,
    load_probe_prompts,
)
from llmtuner.model.adapters import locate_adapters
from llmtuner.model.hub import locate_model
from llmtuner.model.load import embedding_rows, load_model
from llmtuner.model.merge import attach_adapter, merge_adapters
from llmtuner.model.streaming.base_files import read_base
from llmtuner.model.streaming.numbers import DTYPE_NAMES
from llmtuner.model.streaming.texts import stop_ids_of, tokenizer_folder
from llmtuner.model.tokenizer import load_tokenizer

logger = get_logger(__name__)

LOGIT_BOUNDS: Mapping[str, float] = {"F32": 1e-4, "F16": 2e-2, "BF16": 2e-1}
"""Type of the export -> largest difference of a logit, in standard deviations of the logits.

Rounding every weight once moves the logits: by 2^-12 of each weight in float16, 2^-9 in bfloat16.
"""

WEIGHT_BOUNDS: Mapping[str, float] = {"F32": 1e-6, "F16": 2**-10, "BF16": 2**-7}
"""Type of the export -> largest difference of a weight, in parts of it: one unit in the last place.

Added to it is a millionth of the largest weight of the matrix, for the order of float32 sums.
"""

_SUM_ERROR = 1e-6
_SMALLEST_F16 = 2**-24
_NEW_TOKENS = 24
_COMPARED_TOKENS = 16  # of the prompt, before the answer


@dataclass(frozen=True)
class VerifyReport:
    """What was compared, and how far apart it is.

    Attributes:
        dtype: type of the exported weights.
        num_prompts: prompts that both models answered.
        logit_difference: largest, in standard deviations of the logits.
        logit_bound: what it may be.
        num_weights: tensors that were compared number by number.
        num_near_ties: answers that part where the base's two best tokens are as good as equal.
    """

    dtype: str
    num_prompts: int
    logit_difference: float
    logit_bound: float
    num_weights: int
    num_near_ties: int


@dataclass(frozen=True)
class _Answer:
    """What a model does after one prompt.

    Attributes:
        prompt: its ids.
        written: the ids of the greedy answer.
        logits: [tokens, vocabulary] of the last tokens of the prompt and of the answer.
    """

    prompt: list[int]
    written: list[int]
    logits: Tensor


def verify_export(
    folder: Path, model_args: ModelArgs, data_args: DataArgs, *, num_prompts: int
) -> VerifyReport:
    """Compare an exported folder with base and adapters.

    Args:
        folder: the export.
        model_args: base and adapters.
        data_args: the template that was asked for, and rows to take prompts from.
        num_prompts: how many prompts.

    Raises:
        ModelError: something differs by more than rounding explains.
    """
    prompts = load_probe_prompts(data_args, num_prompts)
    ids, stop_ids = _check_texts(folder, model_args, data_args, prompts)
    exported = read_base(folder)
    reference = _load_reference(model_args, rows=_rows(folder, model_args))
    expected = [_answer(reference, prompt, stop_ids) for prompt in ids]
    num_weights = _check_weights(folder, _merged(reference))
    del reference
    loaded = _load_exported(folder, model_args)
    bound = LOGIT_BOUNDS.get(exported.main_dtype, LOGIT_BOUNDS["BF16"])
    difference, num_near_ties = 0.0, 0
    for one in expected:
        other = _answer(loaded, one.prompt, stop_ids)
        found, parts = _compare(one, other, bound)
        difference, num_near_ties = max(difference, found), num_near_ties + parts
    return VerifyReport(
        dtype=DTYPE_NAMES.get(exported.main_dtype, exported.main_dtype),
        num_prompts=len(ids),
        logit_difference=difference,
        logit_bound=bound,
        num_weights=num_weights,
        num_near_ties=num_near_ties,
    )


def _check_texts(
    folder: Path, model_args: ModelArgs, data_args: DataArgs, prompts: Sequence[ProbePrompt]
) -> tuple[list[list[int]], list[int]]:
    """Compare tokenizer, template, stop ids and prompts; return ids of the prompts, and stops."""
    base, adapters = locate_model(model_args), locate_adapters(model_args)
    expected = _tokenizer(tokenizer_folder(base, adapters), model_args)
    found = _tokenizer(folder, model_args)
    template = load_chat_template(data_args, load_tokenizer(model_args))
    is_named = data_args.template is not None and template is not None
    text = template.serving_text() if template and is_named else expected.chat_template
    if is_named and template is not None:
        stops = list(template.stop_ids)
    else:
        stops = next(filter(None, map(stop_ids_of, reversed([base, *adapters]))), [])
    if tokenizer_digest(found) != tokenizer_digest(expected):
        raise _differs("the tokenizer is another one", folder)
    if found.chat_template != text:
        raise _differs("the chat template is another one", folder)
    if sorted(stop_ids_of(folder)) != sorted(stops):
        raise _differs("generation stops at other ids", folder, stop_ids_of(folder), stops)
    own_template = load_chat_template(DataArgs(), found)
    ids = [prompt.ids(expected, template) for prompt in prompts]
    served = [
        prompt.ids(found, own_template if is_named is False else template) for prompt in prompts
    ]
    if ids != served:
        raise _differs("a prompt has other ids", folder)
    return [prompt or [found.eos_token_id or 0] for prompt in ids], stops


def _tokenizer(folder: Path, model_args: ModelArgs) -> PreTrainedTokenizerBase:
    try:
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=model_args.trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise _differs(f"its tokenizer cannot be loaded: {_reason(error)}", folder) from error
    return loaded


def _rows(folder: Path, model_args: ModelArgs) -> int | None:
    """Return the rows of the exported embedding if it grew."""
    base, exported = read_base(locate_model(model_args)), read_base(folder)
    if base.embedding is None:
        return None
    before = base.tensors[base.embedding].num_rows
    after = exported.tensors[base.embedding].num_rows
    return after if after != before else None


def _load_reference(model_args: ModelArgs, *, rows: int | None) -> PreTrainedModel | PeftModel:
    """Load the base in float32, with the last adapter beside its weights."""
    adapters = locate_adapters(model_args)
    model = load_model(
        model_args, dtype=torch.float32, attention="eager", device="cpu", for_training=False
    )
    if rows is not None and rows != embedding_rows(model):
        model.resize_token_embeddings(rows, mean_resizing=False)
    if not adapters:
        return model.eval()
    model = merge_adapters(model, adapters[:-1])
    return attach_adapter(model, adapters[-1]).eval()


def _merged(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    return model.merge_and_unload() if isinstance(model, PeftModel) else model


def _load_exported(folder: Path, model_args: ModelArgs) -> PreTrainedModel:
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="eager",
            use_safetensors=True,
            trust_remote_code=model_args.trust_remote_code,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise _differs(f"it cannot be loaded: {_reason(error)}", folder) from error
    model, report = loaded
    wrong = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
    if wrong:
        raise _differs("some of its weights have other names or shapes", folder, sorted(wrong))
    return model.eval()


def _check_weights(folder: Path, merged: PreTrainedModel) -> int:
    """Compare the exported numbers with those that peft merged, and return how many tensors."""
    parameters = dict(merged.state_dict())
    compared = 0
    for name, tensor in read_base(folder).tensors.items():
        place = next((one for one in _spellings(name, merged) if one in parameters), None)
        if place is None or not tensor.is_floating:
            continue
        want = parameters[place]
        got = torch.from_numpy(tensor.read()).reshape(tensor.info.shape)
        if got.shape != want.shape:
            raise _differs(f"{name} is of another shape", folder, got.shape, tuple(want.shape))
        allowed = want.abs() * WEIGHT_BOUNDS.get(tensor.info.dtype, 0) + _SMALLEST_F16
        allowed += _SUM_ERROR * want.abs().max()
        excess = (got - want).abs() - allowed
        if not bool((excess <= 0).all()):
            worst = int(excess.nan_to_num(torch.inf).argmax())
            raise _differs(
                f"{name} is not the merged weight (worst at number {worst})",
                folder,
                got.flatten()[worst].item(),
                want.flatten()[worst].item(),
            )
        compared += 1
    if not compared:
        logger.warning("Verify: the files name their weights otherwise; only logits are compared.")
    return compared


def _spellings(name: str, model: PreTrainedModel) -> Iterator[str]:
    yield name
    yield f"{model.base_model_prefix}.{name}"


@torch.inference_mode()
def _answer(
    model: PreTrainedModel | PeftModel, prompt: list[int], stop_ids: Sequence[int]
) -> _Answer:
    ids = torch.tensor([prompt])
    settings = GenerationConfig(
        max_new_tokens=_NEW_TOKENS,
        do_sample=False,
        eos_token_id=list(stop_ids) or None,
        pad_token_id=stop_ids[0] if stop_ids else 0,
    )
    written = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings
    )
    first = max(0, len(prompt) - _COMPARED_TOKENS)
    logits = model(input_ids=written, use_cache=False).logits[0, first:].float()
    return _Answer(prompt, written[0, len(prompt) :].tolist(), logits)


def _compare(one: _Answer, other: _Answer, bound: float) -> tuple[float, bool]:
    """Return the largest difference of logits, and whether the answers part at a near tie."""
    same = next(
        (
            n
            for n, pair in enumerate(zip(one.written, other.written, strict=False))
            if len(set(pair)) > 1
        ),
        min(len(one.written), len(other.written)),
    )
    before = min(len(one.prompt), _COMPARED_TOKENS)
    # Row n of the logits is what follows token n: the answers' common part, and the step after it.
    rows = before + same
    left, right = one.logits[:rows], other.logits[:rows]
    if left.shape != right.shape:
        raise _differs("its vocabulary is of another size", None, right.shape, left.shape)
    spread = max(float(left.std()), 1e-6)
    difference = float((left - right).abs().max()) / spread
    if not difference <= bound:
        raise _differs("it computes other logits", None, f"{difference:.2g}", f"{bound:.2g}")
    if one.written == other.written:
        return difference, False
    best, second = left[-1].topk(2).values
    if float(best - second) / spread > 2 * bound:
        raise _differs("it writes another answer", None, other.written, one.written)
    return difference, True


def _differs(
    problem: str, folder: Path | None, got: object = None, allowed: object = None
) -> ModelError:
    return ModelError(
        f"The export is not what it was made from: {problem}.",
        where=None if folder is None else folder.name,
        got=got,
        allowed=None if allowed is None else str(allowed),
        fix="nothing was kept; report this with base and adapter, and export without the adapter "
        "to see which of the two is damaged",
    )


def _reason(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]
