"""Reports on the tokens in which tokenizers differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from gradmerge.common.errors import shorten
from gradmerge.sources.tokenizers.vocabulary import Alignment

_FIRST = 3


def token_report(alignment: Alignment) -> dict[str, Any]:
    """Return the content of tokens.json.

    `differs` lists the tokens that have another id in some checkpoint, or are missing there: the id
    in the merge, and under `rows` the origin of each checkpoint's row: `row 5` (its own), `base`,
    `only a`, `mean of a, b` or `zeros`. `dropped` lists each checkpoint's tokens that the merge
    lacks; `other_settings` its added tokens that are special, or stripped, in another way than in
    the merge.
    """
    vocabulary, names = alignment.vocabulary, list(alignment.checkpoints)
    rows = {name: alignment.rows[name].tolist() for name in names}
    first = names[0]
    differs = []
    for token, i in sorted(alignment.tokens.items(), key=lambda item: item[1]):
        if any(rows[name][i] != i for name in names):
            owners = [name for name in names if rows[name][i] >= 0]
            given = _given(alignment.donors(owners), owners)
            own = {n: f"row {rows[n][i]}" if rows[n][i] >= 0 else given for n in names}
            differs.append({"token": token, "id": i, "rows": own})
    dropped = {
        name: sorted(tokens.ids.keys() - alignment.tokens.keys(), key=tokens.ids.__getitem__)
        for name, tokens in alignment.source_tokens.items()
    }
    return {
        "source": vocabulary.source,
        "ids_of": alignment.owner,
        "tokens": len(alignment.tokens),
        "rows": alignment.size,
        "rows_before": dict(alignment.heights),
        "padding_rows": int((~alignment.named).sum()),
        "pad_to_multiple_of": vocabulary.pad_to_multiple_of,
        "padding": "mean of all tokens' rows",
        "added": alignment.added,
        "dropped": {name: tokens for name, tokens in dropped.items() if tokens},
        "other_settings": alignment.other_settings,
        "chat_template": alignment.template_of,
        "tensors": dict(alignment.axes[first]),
        "warnings": [str(problem) for problem in alignment.warnings],
        "differs": differs,
    }


def _given(donors: Sequence[str], owners: Sequence[str]) -> str:
    if not donors:
        return "zeros"
    if len(owners) == 1:
        return f"only {donors[0]}"
    return donors[0] if len(donors) == 1 else f"mean of {', '.join(donors)}"


def summarise(found: Mapping[str, Any]) -> str:
    """Summarise a report in a few lines: counts per checkpoint, and the first differing tokens."""
    padding = f", {found['padding_rows']} of them padding" if found["padding_rows"] else ""
    template = found["chat_template"]
    lines = [
        f"tokenizer ({found['source']}): {found['tokens']} tokens with the ids of "
        f"{found['ids_of']}, {found['rows']} rows{padding}; "
        + ("no chat template" if template is None else f"chat template of {template}")
    ]
    differs = found["differs"]
    for name, before in found["rows_before"].items():
        kinds = Counter(_kind(entry, name) for entry in differs)
        same = found["tokens"] - sum(kinds.values()) + kinds.pop("as before", 0)
        parts = [f"{same} as before", *(f"{count} {kind}" for kind, count in kinds.items())]
        lost = found["dropped"].get(name, [])
        if lost:
            parts.append(f"{len(lost)} dropped ({shorten([repr(t) for t in lost], _FIRST)})")
        lines.append(f"  {name} ({before} rows): {', '.join(parts)}")
    # tokens that a checkpoint lacks first, then those with another id
    for entry in sorted(differs, key=_is_everywhere)[:_FIRST]:
        rows = ", ".join(f"{name}: {row}" for name, row in entry["rows"].items())
        lines.append(f"  {entry['token']!r} -> {entry['id']} ({rows})")
    if len(differs) > _FIRST:
        lines.append(f"  and {len(differs) - _FIRST} more tokens that differ")
    return "\n".join(lines)


def _is_everywhere(entry: Mapping[str, Any]) -> bool:
    return all(row.startswith("row ") for row in entry["rows"].values())


def _kind(entry: Mapping[str, Any], name: str) -> str:
    row: str = entry["rows"][name]
    if row == f"row {entry['id']}":
        return "as before"
    return "from another row" if row.startswith("row ") else f"from {row}"
