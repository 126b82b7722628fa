"""Which tensor of the result comes from which tensors of base and adapters."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from llmtuner.extras.errors import ModelError
from llmtuner.extras.logs import get_logger
from llmtuner.model.streaming.adapter_settings import AdapterSettings, read_settings
from llmtuner.model.streaming.adapter_tensors import (
    AdapterTensors,
    read_adapter_tensors,
    same_content,
)
from llmtuner.model.streaming.base_files import BaseFiles, is_head
from llmtuner.model.streaming.changes import AddVector, Change, LowRank, MergedTensor
from llmtuner.model.streaming.tensors import StoredTensor

logger = get_logger(__name__)

_OTHER_BASE = "give the base model that the adapter was trained on"


@dataclass(frozen=True)
class MergePlan:
    """What the merged model consists of.

    Attributes:
        tensors: in the order of the base's files.
        vocabulary_rows: rows of the embedding where an adapter made it grow, else None.
        is_untied: head and embedding are one in the base, and differ after the merge.
    """

    tensors: tuple[MergedTensor, ...]
    vocabulary_rows: int | None = None
    is_untied: bool = False


def plan_merge(base: BaseFiles, adapters: Sequence[Path]) -> MergePlan:
    """Find the place of every tensor of the adapters; loads no weights.

    Raises:
        ModelError: an adapter does not fit the base, or is of a kind that cannot be merged.
    """
    tensors = {name: MergedTensor(name, tensor) for name, tensor in base.tensors.items()}
    tied = _tie(tensors, base)
    for folder in adapters:
        _AdapterMerge(
            tensors, base, tied, read_settings(folder), read_adapter_tensors(folder)
        ).run()
    is_untied = bool(tied) and not _are_same(tensors[tied[0]], tensors[tied[1]])
    if is_untied:
        logger.info("The adapters change embedding and head apart: they are not tied any more.")
    elif tied and tied[1] not in base.tensors:
        del tensors[tied[1]]
    return MergePlan(tuple(tensors.values()), _grown_rows(tensors, base), is_untied)


def _tie(tensors: dict[str, MergedTensor], base: BaseFiles) -> tuple[str, ...]:
    """Let the head start as the embedding, and return the names of both; () if they are apart."""
    if not base.is_tied or base.embedding is None:
        return ()
    tensors[base.head] = MergedTensor(base.head, base.tensors[base.embedding])
    return base.embedding, base.head


@dataclass(frozen=True)
class _AdapterMerge:
    """One adapter on its way into the tensors.

    Attributes:
        tensors: the result so far, changed in place.
        base: the base model's files.
        tied: names of the embedding and the head that is the same, or nothing.
        settings: of the adapter.
        adapter: its tensors.
    """

    tensors: dict[str, MergedTensor]
    base: BaseFiles
    tied: tuple[str, ...]
    settings: AdapterSettings
    adapter: AdapterTensors

    def run(self) -> None:
        """Give every tensor of the adapter its place."""
        shared: dict[str, StoredTensor] = {}
        own: dict[str, StoredTensor] = {}
        for name, tensor in self.adapter.base_layers.items():
            shared[self._find(name)] = tensor
        for name, tensor in self.adapter.whole.items():
            is_own = self.settings.saves_whole(name.rpartition(".")[0])
            (own if is_own else shared)[self._find(name)] = tensor
            if not is_own:
                self._check_is_accounted_for(name)
        self._share(shared)
        for place, tensor in {**shared, **own}.items():
            self._replace(place, tensor)
        for module, parts in self.adapter.low_rank.items():
            self._add_low_rank(module, parts)
        self._check_all_are_used()

    def _find(self, name: str) -> str:
        if self.tied and is_head(name):
            return self.tied[1]
        found = self.base.find(name)
        if found is None:
            raise ModelError(
                f"The adapter does not fit this base model: its files have no {name}.",
                where=self.adapter.where,
                got=str(self.base.folder),
                fix=f"{_OTHER_BASE}; models whose files name their weights otherwise than "
                "transformers' modules cannot be merged here",
            )
        return found

    def _share(self, shared: dict[str, StoredTensor]) -> None:
        """Where embedding and head are one weight of the base, a new one is for both."""
        for one, other in (self.tied, self.tied[::-1]) if self.tied else ():
            if one in shared:
                shared.setdefault(other, shared[one])

    def _check_is_accounted_for(self, name: str) -> None:
        """A whole weight is an embedding or head that grew, or a bias that was trained."""
        is_vocabulary = self._find(name) in (self.base.embedding, self.base.head)
        if not is_vocabulary and not (self.settings.trains_bias and name.endswith(".bias")):
            raise ModelError(
                "The adapter holds a tensor that its configuration does not account for.",
                where=self.adapter.where,
                got=name,
                allowed=f"modules_to_save: {list(self.settings.modules_to_save)}",
            )

    def _check_all_are_used(self) -> None:
        used = {name for tensor in self.tensors.values() for name in self._names_in(tensor)}
        forgotten = set(self.adapter.names) - used
        if forgotten:
            raise ModelError(
                "Some tensors of the adapter have no place of their own in the base model.",
                where=self.adapter.where,
                got=sorted(forgotten),
                fix=_OTHER_BASE,
            )

    def _names_in(self, tensor: MergedTensor) -> Iterator[str]:
        stored = [tensor.source]
        for change in tensor.changes:
            stored += change.tensors
        return (one.name for one in stored if str(one.path) == self.adapter.where)

    def _replace(self, place: str, tensor: StoredTensor) -> None:
        old, new = self.tensors[place].shape, tensor.info.shape
        may_grow = place in (self.base.embedding, self.base.head)
        fits = old == new or (may_grow and old[1:] == new[1:] and old[0] < new[0])
        if not fits or not tensor.is_floating:
            raise self._wrong_size(place, (tensor.info.dtype, new), old)
        self.tensors[place] = replace(self.tensors[place], source=tensor, changes=())

    def _add_low_rank(self, module: str, parts: dict[str, StoredTensor]) -> None:
        is_embedding = "embedding_down" in parts
        pair = ("embedding_up", "embedding_down") if is_embedding else ("up", "down")
        wanted = {*pair, *(["magnitude"] if self.settings.use_dora else [])}
        wanted |= {"bias"} if self.settings.lora_bias and not is_embedding else set()
        if set(parts) != wanted:
            raise ModelError(
                f"The adapter's tensors of {module} do not fit its configuration.",
                where=self.adapter.where,
                got=sorted(parts),
                allowed=sorted(wanted),
            )
        place = self._find(f"{module}.weight")
        up, down = (parts[name] for name in pair)
        change = LowRank(
            up,
            down,
            self._scale(module, up, down),
            is_transposed=is_embedding or self._is_transposed(module, place, up, down),
            magnitude=parts.get("magnitude"),
        )
        if change.shape != self.tensors[place].shape:
            raise self._wrong_size(place, change.shape, self.tensors[place].shape)
        if change.magnitude and change.magnitude.info.shape != (up.info.shape[0],):
            raise self._wrong_size(place, change.magnitude.info.shape, (up.info.shape[0],))
        self._add(place, change)
        if "bias" in parts:
            self._add_bias(module, parts["bias"], change.scale)

    def _add_bias(self, module: str, vector: StoredTensor, scale: float) -> None:
        place = self._find(f"{module}.bias")
        if vector.info.shape != self.tensors[place].shape:
            raise self._wrong_size(place, vector.info.shape, self.tensors[place].shape)
        self._add(place, AddVector(vector, scale))

    def _add(self, place: str, change: Change) -> None:
        tensor = self.tensors[place]
        if not tensor.source.is_floating:
            raise ModelError(
                f"{place} is stored quantised, and an adapter cannot be merged into rounded "
                "weights.",
                where=str(tensor.source.path),
                got=tensor.source.info.dtype,
                fix="give the plain base model",
            )
        self.tensors[place] = replace(tensor, changes=(*tensor.changes, change))

    def _scale(self, module: str, up: StoredTensor, down: StoredTensor) -> float:
        rank = self.settings.rank_of(module)
        shapes = up.info.shape, down.info.shape
        if len(shapes[0]) != 2 or len(shapes[1]) != 2 or not shapes[0][1] == shapes[1][0] == rank:
            raise ModelError(
                f"The adapter's matrices of {module} are not of the rank in its configuration.",
                where=self.adapter.where,
                got=shapes,
                allowed=f"rank {rank}",
            )
        return self.settings.scale_of(module)

    def _is_transposed(self, module: str, place: str, up: StoredTensor, down: StoredTensor) -> bool:
        out, inside = up.info.shape[0], down.info.shape[1]
        if out == inside:
            return self.base.is_conv1d(module, otherwise=self.settings.fan_in_fan_out)
        return self.tensors[place].shape == (inside, out)

    def _wrong_size(self, place: str, got: object, allowed: object) -> ModelError:
        return ModelError(
            f"The adapter does not fit this base model: {place} is of another size.",
            where=self.adapter.where,
            got=got,
            allowed=str(allowed),
            fix=_OTHER_BASE,
        )


def _grown_rows(tensors: dict[str, MergedTensor], base: BaseFiles) -> int | None:
    """Return the new size of the vocabulary, after checking that the head has it as well."""
    if base.embedding is None:
        return None
    before, after = base.tensors[base.embedding].num_rows, tensors[base.embedding].shape[0]
    head = tensors.get(base.head)
    if head is not None and head.shape[0] != after and (after != before or head.changes):
        raise ModelError(
            "The adapters make the vocabulary grow, and do not carry all of its rows.",
            got=f"embedding {after} rows, head {head.shape[0]} rows",
            fix="train with embed_tokens and lm_head in --additional_target",
        )
    return after if after != before else None


def _are_same(embedding: MergedTensor, head: MergedTensor) -> bool:
    if not same_content(embedding.source, head.source):
        return False
    if len(embedding.changes) != len(head.changes):
        return False
    return all(map(_are_same_changes, embedding.changes, head.changes))


def _are_same_changes(one: Change, other: Change) -> bool:
    if not isinstance(one, LowRank) or not isinstance(other, LowRank):
        return False
    if one.magnitude or other.magnitude or one.scale != other.scale:
        return False
    return all(map(np.array_equal, _factors(one), _factors(other)))


def _factors(change: LowRank) -> tuple[np.ndarray, np.ndarray]:
    up, down = change.up.read(), change.down.read()
    return (down.T, up.T) if change.is_transposed else (up, down)
