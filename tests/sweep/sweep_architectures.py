"""Try every family of transformers: `python tests/sweep/sweep_architectures.py [--only REGEX]`.

Without `--only` the table is written to docs/reference/architectures.md. Families that plain
transformers does not build, run, save or load with a tiny config are listed with the reason.
"""

from __future__ import annotations

import argparse
import html
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "helpers")]

import torch  # noqa: E402
import transformers  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers.models.auto import modeling_auto  # noqa: E402

from families import batch_of, build_family, families  # noqa: E402
from gradmerge import MergedModel, Recipe  # noqa: E402
from gradmerge.coefficients import Constant  # noqa: E402
from gradmerge.common.errors import GradmergeError  # noqa: E402
from gradmerge.export.folder import export_merged  # noqa: E402
from stored import Suite, eager, loss_of  # noqa: E402

PAGE = HERE.parents[1] / "docs/reference/architectures.md"
TOLERANCE = {True: 1e-9, False: 1e-6}
"""Largest relative error of gradients and exported weights, by whether all is in float64."""

LONGEST = 120
"""Characters of a message on the page."""


@dataclass(frozen=True)
class Row:
    """Result of one family."""

    name: str
    fused: int = 0
    split: int = 0
    gradient: float = 0.0
    """Largest error of a coefficient's gradient, over the largest gradient."""
    export: float = 0.0
    """Largest difference of an exported weight, as transformers loads it, over the largest one."""
    low: bool | None = True
    """Logits in bfloat16 equal those of the exported folder; None if transformers has none."""
    exact: bool = True
    """All weights and constants are in float64."""
    refused: str = ""
    """The message, if gradmerge refuses the family."""

    @property
    def right(self) -> bool:
        """Whether the row passes, or is refused by name."""
        if self.refused:
            return self.name in self.refused
        return max(self.gradient, self.export) <= TOLERANCE[self.exact] and self.low is not False


def all_families() -> Iterator[tuple[str, str]]:
    """Yield the class name and the kind of every family, those of images and text included."""
    found = dict(families())
    for name in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values():
        found.setdefault(name, "IMAGE_TEXT_TO_TEXT")
    yield from found.items()


def measure(name: str, kind: str, folder: Path) -> Row | str:
    """Merge two relatives of a tiny network; return why not if transformers alone cannot."""
    try:
        network = eager(build_family(name).double())
    except Exception as error:
        return _why("does not build", error)
    batch = batch_of(network, kind)
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    try:
        logits = _logits(network, batch)
        if not (isinstance(logits, Tensor) and logits.isfinite().all()):
            return "no finite logits"
        suite = Suite(network, folder)
        if not suite.faithful:
            return "does not load what it saved"
        suite.network(**batch).logits.sum().backward()
        gradients = [p.grad for p in suite.network.parameters() if p.grad is not None]
        if not all(gradient.isfinite().all() for gradient in gradients):
            return "no finite gradients"
    except Exception as error:
        return _why("does not run, save or load", error)
    try:
        # drawn figures would take most of the time
        with patch("gradmerge.export.folder.write_report"):
            return _compare(name, suite, batch, folder)
    except GradmergeError as error:
        return Row(name, refused=str(error))


def _why(what: str, error: Exception) -> str:
    """Say why transformers alone fails, without what differs from run to run."""
    line = " ".join(str(error).split())
    line = re.sub(r"^Class validation error for validator '\w+': ", "", line)
    line = re.sub(r"\s*(at |in )?['\"]?/[\w./-]+['\"]?|0x[0-9a-f]+", "", line)
    line = line if len(line) <= LONGEST else f"{line[:LONGEST].rpartition(' ')[0]} ..."
    return f"{what}: {type(error).__name__}{': ' if line else ''}{line}"


def _logits(network: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return network(**batch).logits


def _compare(name: str, suite: Suite, batch: dict[str, Tensor], folder: Path) -> Row:
    recipe = Recipe(**suite.recipe(init=Constant(0.3)))
    resident = MergedModel(recipe, dtype=torch.float64)
    binding = resident.plan.binding
    converted = bool(binding.fused or binding.split)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(resident.raw["tensor"].shape, generator=generator, dtype=torch.float64)
    table = (0.3 + 0.1 * noise).requires_grad_()
    slots = resident.plan.layout.slots
    coefficients = {n: table[:, slot.index] for n, slot in slots.items()}
    expected = loss_of(suite.run(coefficients, batch).logits.flatten(1))
    expected.backward()
    scale, errors = table.grad.abs().max(), []
    streamed = [MergedModel(recipe, memory="streamed", dtype=torch.float64)] if converted else []
    for merged in (resident, *streamed):
        with torch.no_grad():
            merged.raw["tensor"].copy_(table)
        loss = loss_of(merged(**batch).logits.flatten(1))
        loss.backward()
        errors += [
            (merged.raw["tensor"].grad - table.grad).abs().max() / scale,
            (loss - expected).abs() / expected.abs(),
        ]

    export_merged(resident, folder / "merged")
    with torch.no_grad():
        thetas = suite.thetas(coefficients)
    loaded = suite.load(folder / "merged")
    found = {place: loaded.get_parameter(place) for place in thetas}
    differences = [
        (found[place] - theta).abs().max() / theta.abs().max().clamp_min(1e-6)
        for place, theta in thetas.items()
        if theta.numel()
    ]
    return Row(
        name,
        len(binding.fused),
        len(binding.split),
        max(error.item() for error in errors),
        max(difference.item() for difference in differences),
        _equal_in_bfloat16(recipe, table, suite, batch, folder),
        _is_exact(suite.network, resident.skeleton),
    )


def _is_exact(network: Any, skeleton: Any) -> bool:
    """Return whether all weights are in float64, and constants are not rounded to float32."""
    ours = dict(skeleton.named_buffers())
    constants = ((tensor, ours[place]) for place, tensor in network.named_buffers())
    return {p.dtype for p in network.parameters()} == {torch.float64} and all(
        torch.equal(theirs, own) for theirs, own in constants
    )


def _equal_in_bfloat16(
    recipe: Recipe, table: Tensor, suite: Suite, batch: dict[str, Tensor], folder: Path
) -> bool | None:
    """Compare a merge that computes in bfloat16 with its export as transformers loads it."""
    low = {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch.items()}
    try:
        _logits(suite.kind.from_pretrained(suite.base, dtype=torch.bfloat16).eval(), low)
    except Exception:
        return None
    merged = MergedModel(recipe, dtype=torch.bfloat16)
    with torch.no_grad():
        merged.raw["tensor"].copy_(table)
    export_merged(merged, folder / "low")
    loaded = suite.kind.from_pretrained(folder / "low", dtype=torch.bfloat16).eval()
    return torch.equal(_logits(merged, low), _logits(loaded, low))


def sweep(only: str = "") -> tuple[list[Row], dict[str, str]]:
    """Try all families whose names match; return the rows, and why others could not be tried."""
    rows, untried = [], {}
    for name, kind in all_families():
        if not re.search(only, name):
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                row: Row | str = measure(name, kind, Path(folder))
            except Exception as error:
                row = Row(name, refused=f"{type(error).__name__}: {error}")
        if isinstance(row, Row):
            rows.append(row)
            print(row, "" if row.right else "WRONG", file=sys.stderr, flush=True)
        else:
            untried[name] = row
            print(name, row, file=sys.stderr, flush=True)
    return rows, untried


INTRODUCTION = """# Architectures

Made by `python tests/sweep/sweep_architectures.py` with transformers {version}; do not edit it.
{count} model classes of transformers were tried, as tiny networks with random weights: {right} are
right{refused}. {converted} of them have tensors that transformers fuses or splits on loading
(experts of mixtures, joint projections); those are tried in resident and in streamed memory.
`pytest -m nightly tests/sweep` tries all of them again, and each run of the tests tries twelve.

- **fused**, **split**: parameters that are made of several stored tensors, or of one in another
  order; stored tensors of which several parameters are made.
- **gradient**: largest error of the gradient of a coefficient per tensor and source, over the
  largest such gradient, or of the loss: against autograd in float64 over the weights as
  transformers loads them. Right: at most 1e-9, and 1e-6 where some weights or constants stay in
  float32 (marked *).
- **export**: largest difference between a weight of the exported folder, as transformers loads it,
  and the exact merge, over the largest weight of the parameter. Right: as above.
- **bfloat16**: the logits of the merge that computes in bfloat16 equal, bit for bit, those of the
  exported folder in transformers, which does not run some classes in bfloat16.

The [classes left out](#left-out) are those of which transformers itself does not build, run, save
and load a tiny network, whose sizes are set by rule. It says nothing about their checkpoints.

| class | fused | split | gradient | export | bfloat16 |
|---|---:|---:|---:|---:|---|
"""


LEFT_OUT = """
## Left out

{count} classes were not tried: transformers alone fails with the tiny config, before gradmerge is
called, so there is nothing to compare with. Their real checkpoints may well be merged; what a merge
cannot follow, it refuses by name.

| class | transformers with a tiny config |
|---|---|
"""


def page(rows: list[Row], untried: dict[str, str]) -> str:
    """Write the page of the documentation."""
    refused = sum(bool(row.refused) for row in rows)
    text = INTRODUCTION.format(
        version=transformers.__version__,
        count=len(rows),
        right=sum(row.right and not row.refused for row in rows),
        refused=f", {refused} are refused by name" if refused else "",
        converted=sum(bool(row.fused or row.split) for row in rows),
    )
    for row in sorted(rows, key=lambda row: row.name.lower()):
        if row.refused:
            text += f"| `{row.name}` | | | refused | | |\n"
            continue
        equal = "does not run" if row.low is None else "equal" if row.low else "differ"
        sizes = f"{row.fused or ''} | {row.split or ''}"
        name = f"`{row.name}`" + ("" if row.exact else " *")
        text += f"| {name} | {sizes} | {row.gradient:.0e} | {row.export:.0e} | {equal} |\n"
    text += LEFT_OUT.format(count=len(untried))
    for name in sorted(untried, key=str.lower):
        reason = html.escape(untried[name], quote=False).replace("|", "\\|")
        text += f"| `{name}` | {reason} |\n"
    return text


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="regular expression of class names")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    rows, untried = sweep(given.only)
    wrong = [row.name for row in rows if not row.right]
    if wrong:
        sys.exit(f"wrong: {', '.join(wrong)}")
    if not given.only:
        PAGE.write_text(page(rows, untried))


if __name__ == "__main__":
    main()
