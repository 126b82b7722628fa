"""How an option is declared: `name: type = arg(default, help, …)` in a pydantic dataclass."""

from typing import Any, TypeVar

from pydantic import ConfigDict, Field

T = TypeVar("T")

CHECKED_WHEN_MADE = ConfigDict(defer_build=True)
"""Of every group: its checks are built with the first instance, which `--help` never makes."""


def arg(
    default: T,
    help: str,
    *,
    unit: str | None = None,
    low: float | None = None,
    high: float | None = None,
    secret: bool = False,
) -> T:
    """Declare an option; the same words feed `--help`, the checks and the options page.

    Args:
        default: the value when nobody sets it.
        help: one sentence for the user.
        unit: what a number counts ("tokens").
        low: smallest allowed number.
        high: largest allowed number.
        secret: a password or token, never shown anywhere.
    """
    extra: dict[str, str | bool | None] = {"unit": unit, "secret": secret}
    field: Any = Field(
        default, description=help, ge=low, le=high, repr=not secret, json_schema_extra=dict(extra)
    )
    typed: T = field
    return typed
