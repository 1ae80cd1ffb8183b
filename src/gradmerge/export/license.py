"""The license of a merge: the strictest of its sources', as far as their model cards tell it.

A merge is a derivative work of every source. Where the cards do not settle its license, none is
stated, and card and terminal say why.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from gradmerge.common.errors import GradmergeError
from gradmerge.common.files import read_bytes, read_json, require_bounded
from gradmerge.engine.plan import Plan
from gradmerge.sources import Checkpoint

# From no conditions at all to those that a notice meets; they allow any license of the whole.
_PERMISSIVE = (
    *("cc0-1.0", "unlicense", "wtfpl", "0bsd", "pddl", "zlib", "mit", "isc", "ncsa", "postgresql"),
    *("bsl-1.0", "ms-pl", "bsd-2-clause", "bsd-3-clause", "bsd", "ecl-2.0", "apache-2.0", "odc-by"),
    *("cdla-permissive-1.0", "cdla-permissive-2.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0"),
    "cc-by-4.0",
)


@dataclass(frozen=True)
class License:
    """A license in the terms of the Hugging Face Hub."""

    id: str
    """Identifier, such as `apache-2.0`; `other` for those that the hub does not know."""
    name: str | None = None
    """Name of one that is `other`."""
    link: str | None = None
    """Where its text is, if it is `other`."""

    def __str__(self) -> str:
        return f"{self.name} ({self.id})" if self.name else self.id


@dataclass(frozen=True)
class Terms:
    """The license of a merge, and those of its sources."""

    found: Mapping[str, License | None]
    """License of each source by name; None if its card does not state one."""
    license: License | None
    """That of the merge, if the cards settle it."""
    warning: str | None
    """Why they do not settle it."""


def terms_of(plan: Plan) -> Terms:
    """Return the license of a merge and those of its sources, heads and base."""
    checkpoints = {**({} if plan.base is None else {"base": plan.base}), **plan.serving}
    return strictest({name: _license_of(checkpoint) for name, checkpoint in checkpoints.items()})


def strictest(found: Mapping[str, License | None]) -> Terms:
    """Return the one license that is compatible with all of the sources'.

    Permissive licenses go with every other. Of licenses that restrict more, no two are taken as
    compatible; those without derivatives (`-nd`) allow no merge at all.
    """
    unknown = [name for name, license in found.items() if license is None]
    known = {license for license in found.values() if license is not None}
    strict = {license for license in known if license.id not in _PERMISSIVE}
    named = {n: str(license) for n, license in found.items() if license in strict}
    if any("-nd" in license.id for license in strict):
        return Terms(found, None, f"no derivatives are allowed by a license of {_listed(named)}")
    if len(strict) > 1:
        return Terms(found, None, f"the sources' licenses conflict: {_listed(named)}")
    if unknown:
        text = f"the model cards of {', '.join(unknown)} state none"
        return Terms(found, None, text)
    ordered = sorted(known - strict, key=lambda license: _PERMISSIVE.index(license.id))
    return Terms(found, next(iter([*strict, *ordered[::-1]]), None), None)


def _listed(named: Mapping[str, str]) -> str:
    return ", ".join(f"{name} has {license}" for name, license in named.items())


def _license_of(checkpoint: Checkpoint) -> License | None:
    """Return the strictest license of the folders that a checkpoint is read from."""
    folders = dict.fromkeys(_folders(checkpoint))
    return strictest({str(folder): read_license(folder) for folder in folders}).license


def _folders(checkpoint: Checkpoint) -> Iterable[Path]:
    for part in checkpoint.parts:
        if part.folder is not None:
            yield part.folder
        elif part.side_files:
            yield part.side_files[0].parent


def read_license(folder: Path) -> License | None:
    """Return the license that the model card of a folder states, if any."""
    path = folder / "README.md"
    if not path.is_file():
        return None
    try:
        text = read_bytes(path).decode()
        front = text.split("---", 2)
        if len(front) < 3 or front[0].strip():
            return None
        require_bounded(front[1])
        data: Any = ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    except (GradmergeError, ValueError, TypeError, KeyError, AttributeError):
        return None  # a damaged card states nothing
    except Exception as error:  # of PyYAML, whose classes are not imported for this
        if type(error).__module__.partition(".")[0] == "yaml":
            return None
        raise
    stated = data.get("license")
    if isinstance(stated, list):
        stated = stated[0] if len(stated) == 1 else None
    if not isinstance(stated, str) or not stated or stated == "unknown":
        return None
    name, link = (data.get(f"license_{key}") for key in ("name", "link"))
    if stated == "other" and not isinstance(name, str):
        return None
    other = stated == "other"
    return License(stated.lower(), name if other else None, link if other else None)


def license_note(folder: Path) -> str | None:
    """Return what an exported folder's license needs the user to decide, in one line."""
    found = (read_json(folder / "provenance.json") or {}).get("license", {})
    if not found.get("warning"):
        return None
    return f"license: {found['warning']}; choose one before you publish the merge (README.md)."
