"""Checkpoints and sources by name: `--ckpt_path last`, `best` and `hpc`, and `--sources`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from gradmerge.common.checkpoints import load_checkpoint
from gradmerge.common.errors import ConfigError, nearest

NAMES = ("last", "best", "hpc")


def find_checkpoint(name: str, trainer: Mapping[str, Any]) -> Path:
    """Return the checkpoint that `last`, `best` or `hpc` stands for.

    `last` is the newest checkpoint of the newest fit, `best` the one with the best score of the
    fit that wrote it, `hpc` the one that a cluster's signal left.

    Args:
        name: the name.
        trainer: configuration of the trainer, which says where fits write.

    Raises:
        ConfigError: there is none.
    """
    root = Path(trainer.get("default_root_dir") or "outputs").expanduser()
    if name == "hpc":
        return _newest(name, root, [(root, "hpc_ckpt_*.ckpt")])
    last = _newest(name, root, [(place, "**/*.ckpt") for place in _places(trainer, root)])
    return last if name == "last" else _best(last)


def _places(trainer: Mapping[str, Any], root: Path) -> Iterator[Path]:
    """Yield the folders that checkpoints of fits with this trainer are in."""
    yield root
    yield Path(trainer.get("default_root_dir") or ".").expanduser() / "checkpoints"
    for option, field in (("callbacks", "dirpath"), ("logger", "save_dir")):
        given: Any = trainer.get(option)
        for part in given if isinstance(given, list) else [given]:
            own = part.get("init_args") if isinstance(part, (Namespace, Mapping)) else None
            place = own.get(field) if isinstance(own, (Namespace, Mapping)) else None
            if isinstance(place, str):
                yield Path(place).expanduser()


def _newest(name: str, root: Path, places: Sequence[tuple[Path, str]]) -> Path:
    found = {
        path
        for place, pattern in places
        for path in place.glob(pattern)
        # a driver's steps resume by themselves
        if path.is_file() and "/driver/steps/" not in f"/{path.as_posix()}"
    }
    if not found:
        raise ConfigError(
            f"ckpt_path {name}: expected a checkpoint of an earlier fit below {root}, found none. "
            "Set trainer.default_root_dir to that of the fit, or give the path of the checkpoint."
        )
    return max(found, key=lambda path: (path.stat().st_mtime_ns, path.name == "last.ckpt"))


def _best(last: Path) -> Path:
    """Return the best checkpoint of the fit that wrote another one."""
    states = load_checkpoint(last, mmap=True).get("callbacks", {}).values()
    watched = [s for s in states if isinstance(s, dict) and s.get("monitor")]
    paths = [Path(str(state.get("best_model_path"))) for state in watched]
    # the folder may have moved
    for path in paths:
        for place in (path, last.parent / path.name):
            if place.is_file():
                return place
    got = f"lost {paths[0]}" if paths else "watched no score"
    raise ConfigError(
        f"ckpt_path best: the fit that wrote {last} {got}. Give the path of a checkpoint, or "
        "`last`; a ModelCheckpoint with `monitor` keeps the best one."
    )


def move_sources(recipe: Any, places: Mapping[str, str]) -> None:
    """Put sources at other places in the configuration of a recipe.

    Raises:
        ConfigError: the recipe has no source of a name.
    """
    sources, heads = (recipe.get(option) or {} for option in ("sources", "heads"))
    known = [*sources, *heads, *([] if recipe.get("base") is None else ["base"])]
    for name, place in places.items():
        if name not in known:
            raise ConfigError(
                f"sources: unknown name {name!r} (choose from {', '.join(known)})."
                f"{nearest(name, known)}"
            )
        holder = recipe if name == "base" else sources if name in sources else heads
        spec = holder[name]
        if hasattr(spec, "get") and "path" in (spec.get("init_args") or {}):
            spec["init_args"]["path"] = place  # an adapter keeps its other settings
        else:
            holder[name] = place
