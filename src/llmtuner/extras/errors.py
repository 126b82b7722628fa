"""The errors that users see: what is wrong and where, what we got, what is allowed, what to do."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import ClassVar, Self

from llmtuner.extras.error_kinds import ErrorKind


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the known name that looks most like `word`, whatever its case, or None."""
    names = {name.lower(): name for name in known}
    found = get_close_matches(word.lower(), list(names), n=1, cutoff=0.6)
    return names[found[0]] if found else None


class LlmtunerError(Exception):
    """Base of every error that is the user's to solve; the CLI prints it without a traceback."""

    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        problem: str,
        *,
        got: object = None,
        allowed: Iterable[object] | str | None = None,
        fix: str | None = None,
        where: str | None = None,
    ) -> None:
        """Build the message.

        Args:
            problem: one sentence that names the setting, column or file.
            got: the offending value, shown with `repr`.
            allowed: the accepted values, or a sentence that describes them.
            fix: what to do next.
            where: `file:line`, `file#row` or a flag.
        """
        self.problem = problem
        self.got = got
        self.allowed = allowed
        self.fix = fix
        self.where = where
        super().__init__(problem)

    def __str__(self) -> str:
        """Return one line: `where: problem Got: … Allowed: … Fix: …`."""
        parts = [f"{self.where}: {self.problem}" if self.where else self.problem]
        if self.got is not None:
            parts.append(f"Got: {_shorten(repr(self.got))}.")
        if self.allowed is not None:
            is_text = isinstance(self.allowed, str)
            allowed = self.allowed if is_text else ", ".join(str(name) for name in self.allowed)
            parts.append(f"Allowed: {allowed}.")
        if self.fix:
            end = "" if self.fix.endswith(("?", ".")) else "."
            parts.append(f"Fix: {self.fix}{end}")
        return " ".join(parts)

    def at(self, where: str) -> Self:
        """Return the same error with a place, for callers that know where the value came from."""
        other = type(self).__new__(type(self), self.problem)  # subclasses differ in arguments
        vars(other).update(vars(self), where=where)
        return other


def _shorten(text: str, *, limit: int = 300) -> str:
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"


class ConfigError(LlmtunerError):
    """A setting is unknown, of the wrong type, out of range or in contradiction to another."""

    exit_code = 2


class ConfigErrors(ConfigError):
    """Several configuration problems, reported together."""

    def __init__(self, problems: Sequence[LlmtunerError]) -> None:
        """Join `problems` (at least one), one line each."""
        super().__init__("; ".join(str(problem) for problem in problems))
        self.problems = tuple(problems)

    def __str__(self) -> str:
        """Return the problems, one a line."""
        return "\n".join(str(problem) for problem in self.problems)


class DataError(LlmtunerError):
    """A data file, data set entry or row cannot be used."""

    exit_code = 3
    default_kind: ClassVar[ErrorKind] = "bad_row"

    def __init__(
        self,
        problem: str,
        *,
        got: object = None,
        allowed: Iterable[object] | str | None = None,
        fix: str | None = None,
        where: str | None = None,
        kind: ErrorKind | None = None,
    ) -> None:
        """Build the message, as every error does.

        Args:
            problem: one sentence that names the setting, column or file.
            got: the offending value.
            allowed: the accepted values, or a sentence that describes them.
            fix: what to do next.
            where: `file:line` or `file#row`.
            kind: its class for programs and reports, explained in `ERROR_KINDS`.
        """
        super().__init__(problem, got=got, allowed=allowed, fix=fix, where=where)
        self.kind: ErrorKind = kind or self.default_kind


class TemplateError(DataError):
    """A chat template cannot be proved to train what is served."""

    default_kind: ClassVar[ErrorKind] = "template_contract"


class ModelError(LlmtunerError):
    """A model, adapter or checkpoint is missing, damaged or does not fit."""

    exit_code = 4


class NonFiniteError(LlmtunerError):
    """The loss or a gradient is NaN or infinite."""

    exit_code = 5


class StorageError(LlmtunerError):
    """A place on disk cannot be written, or is full."""

    exit_code = 6


class DistributedError(LlmtunerError):
    """The processes of one job do not agree, or one of them is gone."""

    exit_code = 7


class LayoutError(LlmtunerError):
    """The same samples give another loss or gradient when they are laid out differently."""

    exit_code = 8


class EvalError(LlmtunerError):
    """A benchmark or metric cannot be computed."""

    exit_code = 3


class ScoreError(LlmtunerError):
    """A score is lower than the user allows."""

    exit_code = 9


class MissingExtraError(ConfigError):
    """An optional library is needed and not installed."""

    def __init__(self, library: str, *, extra: str, needed_for: str) -> None:
        """Name the library, the extra that installs it and the feature that asked for it."""
        super().__init__(
            f"{needed_for} needs the library {library!r}, which is not installed.",
            fix=f"pip install 'llmtuner[{extra}]'",
        )
