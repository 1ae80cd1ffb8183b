"""`gradmerge inspect`: compatibility, sizes and directions of checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from gradmerge.common.errors import Problem, report, shorten
from gradmerge.common.patterns import require_matches
from gradmerge.engine.inventory import take_inventory
from gradmerge.sources import AbstractSource, Checkpoint, Vocabulary, as_source
from gradmerge.sources.agreement import check_agreement
from gradmerge.sources.base import find_flaws
from gradmerge.sources.compatibility import check, check_private, is_private
from gradmerge.sources.composite import complete
from gradmerge.sources.geometry import direction_statistics
from gradmerge.sources.renaming import unify_names
from gradmerge.sources.sharing import share_of, shared_tensors
from gradmerge.sources.ties import Networks, may_be_tied, settle_ties
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
        `sources` (size, dtypes and architecture by name), `problems`, `compatible`, `weights_read`
        (if not, NaN and infinity were not looked for), and, if known, `tokenizer` (differences of
        the vocabularies), `statistics` (geometry of the directions) and `unchanged` (tensors that
        are the same in all checkpoints).
    """
    if tokenizer is not None:
        Vocabulary(tokenizer).require(list(sources), base is not None)
    opened = _open(sources, None if base is None else as_source(base))
    networks = Networks({"base": base, **sources})
    tuned = {name: opened[name] for name in sources}
    whole, notes = complete(tuned, opened.get("base"), networks.look)
    opened = {**opened, **whole}
    order = {name: opened[name] for name in [*sources, *opened]}
    opened, problems = unify_names(opened, partial(networks.first, order), private)
    problems = [*notes, *problems]
    if may_be_tied(opened, private):
        settled = settle_ties(opened, networks, private)
        opened, problems = settled.checkpoints, [*problems, *settled.notes]
    tensors = (name for checkpoint in opened.values() for name in checkpoint.infos)
    require_matches({"private": private}, dict.fromkeys(tensors), "tensor of the sources")
    if tokenizer is not None:
        opened, warnings = align(Vocabulary(tokenizer), opened)
        problems += warnings
    tuned = {name: opened[name] for name in sources}
    problems += [*check(opened, private, allow), *check_private(tuned, private, allow)]
    if not any(problem.fatal for problem in problems):
        problems += check_agreement(opened, list(sources), networks.look, private)
    if statistics:
        problems += _flaws(opened, private)
    compatible = not any(problem.fatal for problem in problems)
    sizes = {name: _size(checkpoint) for name, checkpoint in opened.items()}
    found: dict[str, Any] = {
        "sources": sizes,
        "problems": problems,
        "compatible": compatible,
        "weights_read": statistics,
    }
    alignment = alignment_of(next(iter(opened.values())))
    if alignment is not None:
        found["tokenizer"] = token_report(alignment)
    if statistics and compatible and tuned:
        found["statistics"] = _directions(tuned, opened.get("base"), private)
        found["unchanged"] = _unchanged(opened, private)
    return found


def _flaws(opened: Mapping[str, Checkpoint], private: Sequence[str]) -> list[Problem]:
    """Read all weights and return tensors with NaN or infinity."""
    first = next(iter(opened.values()))
    buffers = take_inventory(list(first.infos), first, None, private).buffers
    return [
        Problem(
            "nonfinite",
            f"{' and '.join(flaw.names)} ({flaw.file})",
            flaw.tensor,
            "finite weights",
            f"NaN or infinity in {flaw.entries}",
            "Copy or download the checkpoint again, or leave it out.",
        )
        for flaw in find_flaws(opened, buffers)[0]
    ]


def _open(sources: Mapping[str, Any], base: AbstractSource | None) -> dict[str, Checkpoint]:
    tuned = {name: as_source(source, base).open() for name, source in sources.items()}
    return tuned if base is None else {"base": base.open(), **tuned}


def _directions(
    tuned: Mapping[str, Checkpoint], base: Checkpoint | None, private: Sequence[str]
) -> dict[str, Any]:
    checkpoints = list(tuned.values())
    infos = checkpoints[0].infos.items()
    floats = [name for name, info in infos if info.dtype.is_floating_point]
    names = [name for name in floats if not is_private(name, private)]
    found = direction_statistics(checkpoints, base, names, mean_origin=len(tuned) > 1)
    return {
        "origin": "mean of the sources" if base is None else "base",
        "origin_norm": found.origin_squared**0.5,
        "norm": dict(zip(tuned, found.norms.tolist(), strict=True)),
        "cosine": found.cosines.tolist(),
        "sign_conflict": found.sign_conflict.tolist(),
    }


def _unchanged(opened: Mapping[str, Checkpoint], private: Sequence[str]) -> dict[str, Any]:
    """Return the tensors with the same values in all checkpoints, and how much they are in words.

    A single checkpoint shares nothing.
    """
    first, *others = opened.values()
    tensors = take_inventory(list(first.infos), first, None, private).tensors
    names = shared_tensors(tensors, [first, *others]) if others else []
    share = share_of(names, {name: first.infos[name].num_elements for name in tensors})
    return {"tensors": names, "share": share}


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
        sizes = [f"{entry['parameters']:,}", f"{entry['bytes'] / 1e6:,.1f} MB"]
        dtypes = "/".join(entry["dtypes"])
        rows.append([name, entry["architecture"], str(entry["tensors"]), *sizes, dtypes])
    problems = "\n" + report(found["problems"]) if found["problems"] else ""
    warned = ", with warnings" if problems else ""
    answer = f"yes{warned}" if found["compatible"] else "no"
    parts = [table(rows), f"compatible: {answer}{problems}"]
    if not found["weights_read"]:
        parts.append("The weights were not read (--statistics false): NaN would go unnoticed.")
    if "tokenizer" in found:
        parts.append(summarise(found["tokenizer"]))
    if found.get("unchanged", {}).get("tensors"):
        where = "all sources and the base" if "base" in found["sources"] else "all sources"
        same = found["unchanged"]
        parts.append(f"the same in {where}: {same['share']}: {shorten(same['tensors'])}")
    measured = found.get("statistics")
    if measured:
        norms, relative = measured["norm"], measured["origin_norm"]
        rows = [["direction", "norm"], *([name, f"{norm:.4g}"] for name, norm in norms.items())]
        if relative:
            ratios = [f"{norm / relative:.4f}" for norm in norms.values()]
            rows = [[*r, cell] for r, cell in zip(rows, ["norm / |base|", *ratios], strict=True)]
        parts.append(f"directions from the {measured['origin']}:\n{table(rows)}")
        for title, key in (
            ("cosine of directions", "cosine"),
            ("share of commonly changed entries with opposite signs", "sign_conflict"),
        ):
            rows = [["", *norms]]
            for name, values in zip(norms, measured[key], strict=True):
                rows.append([name, *(f"{value:.3f}" for value in values)])
            parts.append(f"{title}:\n{table(rows)}")
    return "\n\n".join(parts)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Format rows as columns, the first aligned left and the others right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
