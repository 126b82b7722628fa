"""What the HTML page of an audit shows: its tables, and rows token by token."""

from collections.abc import Mapping
from itertools import chain
from typing import Any

from llmtuner.data.audit.collect import encode_each
from llmtuner.data.audit.defects import DEFECTS
from llmtuner.data.audit.overlap import usable_rows
from llmtuner.data.audit.report import Audit
from llmtuner.data.dataset_info import load_dataset_specs
from llmtuner.data.render import Encoded
from llmtuner.data.token_view import SampleView, token_view
from llmtuner.data.tokenise import Encoder
from llmtuner.hparams.data import DataArgs

_NUM_PLACES = 20
_NUM_PLAIN = 3  # rows at the head, defects or not


def sample_views(audit: Audit, args: DataArgs, encode: Encoder, *, most: int) -> list[SampleView]:
    """Return samples to show: the first rows, and the first row of every class of defect.

    Args:
        audit: says where the defects are.
        args: names the data sets.
        encode: makes the samples.
        most: samples wanted.
    """
    firsts = {
        finding.places[0]["where"]: None
        for one in audit.sets.values()
        for finding in one.findings.values()
    }
    wanted = dict.fromkeys([*firsts][: most - _NUM_PLAIN])
    names = [*(args.dataset or ()), *(args.eval_dataset or ())]
    rows = usable_rows(load_dataset_specs(args, names), args)
    chosen = [row for number, row in enumerate(rows) if number < _NUM_PLAIN or row.source in wanted]
    encoded = [one for one in encode_each(chosen, encode) if isinstance(one, Encoded)]
    views = chain.from_iterable(token_view(one, encode.tokenizer) for one in encoded)
    return [*views][:most]


def page_values(audit: Audit) -> dict[str, Any]:
    """Return the sections of the page: totals, findings of each set, lengths, limits."""
    values = audit.to_dict()
    totals = {
        name: value
        for name, value in values["totals"].items()
        if name not in ("findings", "length_histogram", "unreadable")
    }
    sections: dict[str, Any] = {"totals": totals, "datasets": {}}
    for name, one in values["datasets"].items():
        left_out = ("findings", "length_histogram")
        sections["datasets"][name] = {k: v for k, v in one.items() if k not in left_out}
    sections["length_histogram"] = values["totals"]["length_histogram"]
    sections["findings"] = [
        finding
        for name, one in values["datasets"].items()
        for finding in _findings(name, one["findings"])
    ]
    sections["limits"] = [
        {"defect": name, "limit": f"{share:.2%}"} for name, share in values["limits"].items()
    ]
    sections["exceeded"] = values["exceeded"]
    return sections


def _findings(dataset: str, findings: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "dataset": dataset,
            "defect": name,
            "severity": DEFECTS[name].severity,
            "rows": found["rows"],
            "share": f"{found['share']:.2%}",
            "meaning": found["meaning"],
            "places": [_place(place) for place in found["places"][:_NUM_PLACES]],
        }
        for name, found in findings.items()
    ]


def _place(place: Mapping[str, Any]) -> str:
    turn = f" turn {place['turn']}" if place["turn"] else ""
    return f"{place['where']}{turn}" + (f": {place['note']}" if place["note"] else "")
