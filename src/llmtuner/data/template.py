"""Chat templates: loading one for a tokenizer.

Everything that a template says about itself is found out by rendering small probe conversations, so
that our own templates, a user's file and the tokenizer's own template are all treated alike.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from llmtuner.data.chat_jinja import has_marks, literals_of, variables_of
from llmtuner.data.probes import Abilities, Ends, Prober, probe_abilities, probe_ends
from llmtuner.data.template_text import (
    own_text,
    serving_text,
    with_default_system,
    with_fixed_date,
    with_thinking,
)
from llmtuner.data.templates import read_template
from llmtuner.extras.errors import TemplateError

_HEADER = re.compile(r"\{#-?\s*(control|stop):(.*?)-?#\}", re.DOTALL)
_THINKING_SWITCHES = frozenset({"enable_thinking", "open_thinking", "thinking"})
_THINKING_TAGS = frozenset({"<think>", "</think>"})  # a few tokenizers call them special


@dataclass(frozen=True)
class Template:
    """A chat template that is ready to render for one tokenizer.

    Attributes:
        name: what `--template` said; "" for the tokenizer's own.
        text: the Jinja text, with its generation marks and with the user's default system prompt.
        has_marks: the text says itself what the model writes.
        stop_ids: the ids that serving stops on; every trained span ends in one of them.
        stop_tokens: their texts.
        abilities: what the template can show.
        special_tokens: `bos_token` and the like, for the template's use.
        ends: how its turns begin and end.
        thinking_switches: the variables by which the template turns thinking on and off.
        enable_thinking: their value; None leaves them undefined.
        is_space_added: the tokenizer writes a space in front of every text, as SentencePiece does.
        cutting_stops: stop tokens at which the tokenizer cuts every text before anything else.
        guards: finds, in everything that serving sends, the control tokens that text of users,
            tools and data can never become: those of which the tokenizer says it, and those that
            the template writes.
        answer_guards: finds those that an answer cannot hold; the model itself may write the tags
            of thoughts and calls.
    """

    name: str
    text: str
    has_marks: bool
    stop_ids: tuple[int, ...]
    stop_tokens: tuple[str, ...]
    abilities: Abilities
    special_tokens: Mapping[str, str] = field(repr=False)
    ends: Ends = field(repr=False)
    thinking_switches: frozenset[str] = frozenset()
    enable_thinking: bool | None = True
    is_space_added: bool = False
    cutting_stops: Mapping[int, str] = field(default_factory=dict, repr=False)
    guards: re.Pattern[str] = field(default=re.compile("(?!)"), repr=False)
    answer_guards: re.Pattern[str] = field(default=re.compile("(?!)"), repr=False)

    def variables(self, enable_thinking: bool | None) -> dict[str, Any]:
        """Return the template variables of one rendering."""
        if enable_thinking is None:
            return dict(self.special_tokens)
        return {**self.special_tokens, **dict.fromkeys(self.thinking_switches, enable_thinking)}

    @property
    def label(self) -> str:
        """What messages call it, as the beginning of a sentence."""
        return _label(self.name)

    def serving_text(self) -> str:
        """Return the template to save with the model, for any Jinja engine.

        It thinks by default as training does.
        """
        switches = sorted(self.thinking_switches)
        return with_thinking(serving_text(self.text), switches, self.enable_thinking)


def load_template(
    name: str | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    default_system: str | None = None,
    enable_thinking: bool | None = True,
) -> Template:
    """Load a named template, a `.jinja` file, or (without a name) the tokenizer's own.

    Args:
        name: the value of `--template`.
        tokenizer: must have the template's control tokens.
        default_system: system prompt of conversations that have none.
        enable_thinking: passed to templates that can think; None leaves the choice to them.

    Raises:
        TemplateError: there is no such template, the tokenizer lacks its control tokens, or nothing
            ends a turn.
    """
    label = _label(name)
    text = read_template(name) if name else _own_text(tokenizer)
    switches = _THINKING_SWITCHES & variables_of(text)
    header = _header(text)
    _check_control_tokens(header.get("control", []), tokenizer, label=label)
    text = with_fixed_date(text, label=label)
    special = {key: str(token) for key, token in tokenizer.special_tokens_map.items()}
    added = tokenizer.added_tokens_decoder.values()
    only_special = [token.content for token in added if token.special]
    guarded = _guarded_tokens(text, tokenizer)
    if default_system:
        text = with_default_system(text, default_system, guarded)
    thinking = {} if enable_thinking is None else dict.fromkeys(switches, enable_thinking)
    prober = Prober(text, {**special, **thinking}, label)
    abilities = probe_abilities(prober)
    ends = _ends(prober, abilities, header.get("stop", []), only_special, guarded)
    stop_ids = _ids_of(ends.stops, tokenizer, label=label)
    first_piece = tokenizer.convert_ids_to_tokens(tokenizer.encode("a", add_special_tokens=False))
    return Template(
        name=name or "",
        text=text,
        has_marks=has_marks(text),
        stop_ids=tuple(stop_ids.values()),
        stop_tokens=tuple(stop_ids),
        abilities=abilities,
        special_tokens=special,
        ends=ends,
        thinking_switches=switches,
        enable_thinking=enable_thinking,
        is_space_added=first_piece[:1] != [] and first_piece[0].startswith("▁"),
        cutting_stops=_cutting(stop_ids.values(), tokenizer),
        guards=any_of(guarded),
        answer_guards=any_of({*only_special, *stop_ids}.difference(_THINKING_TAGS)),
    )


def any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that finds any of the tokens, the longest first; of none, nothing."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _label(name: str | None) -> str:
    return f"Template {name!r}" if name else "The tokenizer's own template"


def _own_text(tokenizer: PreTrainedTokenizerBase) -> str:
    return own_text(tokenizer.chat_template, name_or_path=str(tokenizer.name_or_path))


def _ends(
    prober: Prober,
    abilities: Abilities,
    named: Sequence[str],
    special: Sequence[str],
    guarded: Sequence[str],
) -> Ends:
    """Return how turns end: as the template's header says it, else as its renderings show.

    Raises:
        TemplateError: nothing ends an answer.
    """
    words = [str(prober.variables.get(word, word)) for word in named]
    # A few tokenizers do not call their control tokens special.
    visible = [[token for token in tokens if token.strip()] for tokens in (special, guarded)]
    problems: list[TemplateError] = []
    for tokens in visible:
        try:
            return probe_ends(prober, abilities, any_of(tokens), named=words)
        except TemplateError as problem:
            problems.append(problem)
    raise problems[0]


def _header(text: str) -> dict[str, list[str]]:
    """Read `{#- control: … -#}` and `{#- stop: … -#}`: words apart by white space."""
    return {kind: words.split() for kind, words in _HEADER.findall(text)}


def _guarded_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Return the tokens that transformers guards with `sanitize_control_tokens=True`."""
    if tokenizer.chat_control_tokens is not None:
        known: Sequence[str] = tokenizer.chat_control_tokens
    else:
        literals = literals_of(text)
        added = tokenizer.added_tokens_encoder
        known = [token for token in added if token in literals and not token.isspace()]
    return tuple(
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special or token.content in known
    )


def _check_control_tokens(
    tokens: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, label: str
) -> None:
    missing = [token for token in tokens if single_id(token, tokenizer) is None]
    if missing:
        words = ",".join(missing)
        raise TemplateError(
            f"{label} has control tokens that this tokenizer lacks.",
            got=missing,
            fix="choose the template that the model was trained with, or add them with "
            f"--add_special_tokens '{words}' --resize_vocab",
        )


def single_id(token: str, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id of a text that the tokenizer reads as one token, else None."""
    token_id = tokenizer.convert_tokens_to_ids(token)
    if not isinstance(token_id, int):
        return None
    ids = tokenizer.encode(token, add_special_tokens=False)
    # SentencePiece may write a space of its own in front.
    is_single = ids[-1:] == [token_id] and len(ids) <= 2
    return token_id if is_single and not str(tokenizer.decode(ids[:-1])).strip() else None


def _ids_of(
    words: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, label: str
) -> dict[str, int]:
    """Return the ids of the stop words; serving always stops on the end-of-text id too."""
    ids = {word: single_id(word, tokenizer) for word in words}
    found = {word: token_id for word, token_id in ids.items() if token_id is not None}
    if not words or len(found) < len(ids):
        raise TemplateError(
            f"{label} ends its turns in nothing that is one token of this tokenizer.",
            got=list(words),
            fix="give the tokenizer an eos_token, or choose another --template",
        )
    if tokenizer.eos_token_id is not None:
        found.setdefault(str(tokenizer.eos_token), tokenizer.eos_token_id)
    return found


def _cutting(ids: Iterable[int], tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Return the stops at which every text is cut, wherever they stand in it."""
    if not tokenizer.is_fast:
        return {}
    added = tokenizer.added_tokens_decoder
    texts = [token.content for token in added.values()]
    stops = {token_id: added[token_id] for token_id in ids if token_id in added}
    return {
        token_id: token.content
        for token_id, token in stops.items()
        if token.special
        and not token.normalized
        and not token.single_word
        # a longer one would be found instead
        and not any(token.content in text for text in texts if text != token.content)
    }
