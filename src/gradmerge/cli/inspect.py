"""`gradmerge inspect`: compatibility, sizes and directions of checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gradmerge.common.errors import Problem, report
from gradmerge.sources import Checkpoint, Vocabulary, as_source
from gradmerge.sources.compatibility import check, check_private, is_private
from gradmerge.sources.geometry import direction_statistics
from gradmerge.sources.tokenizers.report import summarise, token_report
from gradmerge.sources.tokenizers.view import align, alignment_of


def inspect_sources(
    sources: Mapping[str, Any],
    base: Any = None,
    private: Sequence[str] = (),
    allow: Sequence[str] = (),
    statistics: bool = True,
    tokenizer: str | None = None,
) -> dict[str, Any]:
    """Return the report of `gradmerge inspect` as data.

    Args:
        sources: paths, hub ids, modules or source objects by name.
        base: checkpoint that they were fine-tuned from.
        private: regular expressions of tensors that are kept per task.
        allow: kinds of problems to report as warnings.
        statistics: read the weights and report norms, cosines and sign conflicts.
        tokenizer: vocabulary of a merge if tokenizers differ: union, base, or the name of a source.

    Returns:
        `sources` (size, dtypes and architecture by name), `problems`, `compatible`, and, if known,
        `tokenizer` (differences of the vocabularies) and `statistics` (geometry of the directions).
    """
    vocabulary = None if tokenizer is None else Vocabulary(tokenizer)
    if vocabulary is not None:
        vocabulary.require(list(sources), base is not None)
    base_source = None if base is None else as_source(base)
    opened = {} if base_source is None else {"base": base_source.open()}
    opened.update({name: as_source(s, base_source).open() for name, s in sources.items()})
    problems: list[Problem] = []
    if vocabulary is not None:
        opened, problems = align(vocabulary, opened)
    problems += check(opened, private, allow)
    tuned = {name: opened[name] for name in sources}
    problems += check_private(tuned, private, allow)
    found: dict[str, Any] = {
        "sources": {name: _size(checkpoint) for name, checkpoint in opened.items()},
        "problems": problems,
        "compatible": not any(problem.fatal for problem in problems),
    }
    alignment = alignment_of(next(iter(opened.values())))
    if alignment is not None:
        found["tokenizer"] = token_report(alignment)
    if statistics and found["compatible"] and len(sources) >= 1:
        checkpoints = [opened[name] for name in sources]
        names = [
            name
            for name, info in checkpoints[0].infos.items()
            if info.dtype.is_floating_point and not is_private(name, private)
        ]
        measured = direction_statistics(
            checkpoints, opened.get("base"), names, mean_origin=base is None and len(sources) > 1
        )
        found["statistics"] = {
            "origin": "base" if base is not None else "mean of the sources",
            "origin_norm": measured.origin_squared**0.5,
            "norm": dict(zip(sources, measured.norms.tolist(), strict=True)),
            "cosine": measured.cosines.tolist(),
            "sign_conflict": measured.sign_conflict.tolist(),
        }
    return found


def _size(checkpoint: Checkpoint) -> dict[str, Any]:
    infos = checkpoint.infos.values()
    return {
        "from": checkpoint.label,
        "tensors": len(infos),
        "parameters": sum(info.num_elements for info in infos),
        "bytes": sum(info.num_bytes for info in infos),
        "dtypes": sorted({str(info.dtype).removeprefix("torch.") for info in infos}),
        "architecture": ((checkpoint.config or {}).get("architectures") or ["unknown"])[0],
    }


def render(found: Mapping[str, Any]) -> str:
    """Format the report as text tables."""
    rows = [["source", "architecture", "tensors", "parameters", "size", "dtype"]]
    for name, entry in found["sources"].items():
        rows.append(
            [
                name,
                entry["architecture"],
                str(entry["tensors"]),
                f"{entry['parameters']:,}",
                f"{entry['bytes'] / 1e6:,.1f} MB",
                "/".join(entry["dtypes"]),
            ]
        )
    parts = [table(rows)]
    problems = found["problems"]
    parts.append(
        "compatible: yes" + ("" if not problems else f", with warnings\n{report(problems)}")
        if found["compatible"]
        else f"compatible: no\n{report(problems)}"
    )
    if "tokenizer" in found:
        parts.append(summarise(found["tokenizer"]))
    measured = found.get("statistics")
    if measured:
        names = list(measured["norm"])
        relative = measured["origin_norm"]
        rows = [["direction", "norm", *(["norm / |base|"] if relative else [])]]
        for name, norm in measured["norm"].items():
            rows.append([name, f"{norm:.4g}", *([f"{norm / relative:.4f}"] if relative else [])])
        parts.append(f"directions from the {measured['origin']}:\n" + table(rows))
        parts.append("cosine of directions:\n" + _matrix(names, measured["cosine"]))
        parts.append(
            "share of commonly changed entries with opposite signs:\n"
            + _matrix(names, measured["sign_conflict"])
        )
    return "\n\n".join(parts)


def _matrix(names: Sequence[str], values: Sequence[Sequence[float]]) -> str:
    rows = [["", *names]]
    for name, row in zip(names, values, strict=True):
        rows.append([name, *(f"{value:.3f}" for value in row)])
    return table(rows)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Format rows as columns, the first aligned left and the others right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
