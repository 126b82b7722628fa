"""Ways to break a chat template, by changing its text; each breaks what serving and training share.

A mutation gets the text and a random generator, and returns the changed text, or None where the
template has nothing to change.
"""

import re
from collections.abc import Callable
from random import Random

Mutation = Callable[[str, Random], str | None]

_WORDS = ("Well: ", "XX", "#### ", "assistant ", "答：")
_LAST = "messages and messages[-1].role == 'assistant'"


def _word(random: Random) -> str:
    return random.choice(_WORDS)


def _before(condition: str, statement: str) -> Mutation:
    """Change the messages in front of the template."""
    return lambda text, random: (
        f"{{% if {condition} +%}}{{% set {statement.replace('WORD', _word(random))} +%}}"
        f"{{% endif +%}}{text}"
    )


def _each(change: str) -> Mutation:
    """Change messages one by one; `m` is the message, `loop` the loop."""
    return lambda text, random: (
        "{% set all = namespace(list=[]) +%}{% for m in messages +%}"
        f"{{% set all.list = all.list + [{change.replace('WORD', _word(random))}] +%}}"
        f"{{% endfor +%}}{{% set messages = all.list +%}}{text}"
    )


def _answer(change: str) -> Mutation:
    changed = f"dict(messages[-1], content={change.replace('IT', 'messages[-1].content')})"
    return _before(_LAST, f"messages = messages[:-1] + [{changed}]")


def _replaced(pattern: str, by: str) -> Mutation:
    def mutate(text: str, random: Random) -> str | None:
        changed, count = re.subn(pattern, by.replace("WORD", _word(random)), text, flags=re.DOTALL)
        return changed if count else None

    return mutate


def _after(statement: str) -> Mutation:
    return lambda text, random: text + statement.replace("WORD", _word(random))


def _broken_stop(text: str, random: Random) -> str | None:
    """Spell the tokens that end turns wrongly."""
    tokens = "<|im_end|> <|eot_id|> <end_of_turn> <|end|> <|END_OF_TURN_TOKEN|> <|return|> [e~["
    cut = random.choice((1, 2))
    changed = text
    for token in [*tokens.split(), "<turn|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>"]:
        changed = changed.replace(token, token[:-cut])
    changed = re.sub(r"\beos_token\b(?!['\"])", "'[END]'", changed)
    return None if changed == text else changed


_SWAPPED = "dict(m, role={'user': 'assistant', 'assistant': 'user'}.get(m.role, m.role))"
_OUTPUT = r"(\{\{-(?:(?!-\}\}).)*-\}\}\s*)"

MUTATIONS: dict[str, Mutation] = {
    "end token outside the mark": _replaced(_OUTPUT + r"(\{%-?\s*endgeneration\s*-?%\})", r"\2\1"),
    "mark closed at once": lambda text, random: (
        re.sub(
            r"(\{%-?\s*generation\s*-?%\})(.*?)(\{%-?\s*endgeneration\s*-?%\})",
            r"\1\3\2",
            text,
            flags=re.DOTALL,
        )
        if re.search(r"\{%-?\s*generation", text)
        else None
    ),
    "mark begins late": _replaced(
        r"(\{%-?\s*generation\s*-?%\}\s*)" + _OUTPUT + r"(?!\s*\{%-?\s*endgen)", r"\2\1"
    ),
    "header dropped": _replaced(r"\badd_generation_prompt\b", "no_such_flag"),
    "generation prompt longer": _after("{% if add_generation_prompt +%}WORD{% endif %}"),
    "generation prompt elsewhere": lambda text, _: (
        "{% if add_generation_prompt +%}{% set messages = messages[:-1] +%}{% endif +%}" + text
    ),
    "answer with more in front": _answer("'WORD' + IT"),
    "answer with more behind": _answer("IT + ' WORD'"),
    "answer in capitals": _answer("IT | upper"),
    "answer cut": _answer("IT[:-1]"),
    "answer without its first letter": _answer("IT[1:]"),
    "system dropped": _before("messages[0].role == 'system'", "messages = messages[1:]"),
    "roles swapped": _each(_SWAPPED),
    "roles swapped with the answer": _before(
        _LAST, "messages = messages[:-1] + [dict(messages[-1], role='user')]"
    ),
    "question changed with the answer": _each(
        "dict(m, content='WORD' + m.content) if m.role == 'user' and "
        "messages[-1].role == 'assistant' else m"
    ),
    "beginning of text doubled": lambda text, _: (
        "{{ bos_token }}{{ bos_token }}" + re.sub(r"\bbos_token\b(?!['\"])", "''", text)
    ),
    "beginning of text with the answer": lambda text, _: (
        f"{{% if {_LAST} +%}}{{{{ bos_token }}}}{{% endif +%}}{text}"
    ),
    "stop token replaced": _broken_stop,
    "turns counted": lambda text, _: "{{ messages | length }}" + text,
    "history rewritten": _each(
        "m if loop.last or m.role != 'assistant' else dict(m, content=m.content[:1])"
    ),
}
