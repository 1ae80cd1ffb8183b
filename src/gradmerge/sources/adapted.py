"""The config and the network of a base with an adapter that replaced or added tensors."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from gradmerge.common.errors import SourceError
from gradmerge.common.files import read_json
from gradmerge.sources.base import Checkpoint, TensorInfo
from gradmerge.sources.files import write_json
from gradmerge.sources.modules import copy_modules
from gradmerge.sources.side_files import copy_files
from gradmerge.sources.skeleton import build_skeleton, renames
from gradmerge.sources.tokenizers.ids import with_size

# Tables of model classes in transformers, by PEFT's names of tasks.
_CLASSES = {
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
}
# Fields of a config that an adapter's own one may know better than its base's.
_LABELS = ("id2label", "label2id", "problem_type", "finetuning_task")


class AdaptedFolder:
    """A temporary folder with the small files of a base, and the config of the adapted model.

    It exists as long as this object.

    Args:
        adapter: folder of the adapter.
        settings: its adapter_config.json.
        base: the base.
        changed: tensors that the base does not have, or in another shape.
    """

    def __init__(
        self,
        adapter: Path,
        settings: Mapping[str, Any],
        base: Checkpoint,
        changed: Mapping[str, TensorInfo],
    ) -> None:
        assert base.folder is not None
        assert base.config is not None
        self.path = Path(tempfile.mkdtemp(prefix="gradmerge-adapter-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
        copy_files(base.folder, self.path, ignored=["config.json"])
        copy_modules(base.folder, self.path)
        self._names = list(base.infos)
        config = _with_rows(base, changed)
        name = _class_of(settings, config)
        if name is not None:
            config["architectures"] = [name]
        own = read_json(adapter / "config.json") or {}
        config.update({key: own[key] for key in _LABELS if key in own})
        self.config = config
        self._settle_labels(own, changed)

    def _settle_labels(self, own: Mapping[str, Any], changed: Mapping[str, TensorInfo]) -> None:
        """Choose the number of labels with which the network has the adapter's tensors."""
        first = self.config
        for config in _with_labels(first, changed):
            write_json(self.path / "config.json", config)
            if self._fits(changed):
                self.config = config
                return
        write_json(self.path / "config.json", first)

    def _fits(self, changed: Mapping[str, TensorInfo]) -> bool:
        module = self.network
        if module is None:
            return False
        try:
            places = renames(module, [*self._names, *changed])
        except SourceError:
            return False
        shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        return all(shapes.get(places[name]) == info.shape for name, info in changed.items())

    def unused(self, names: Iterable[str]) -> set[str]:
        """Return which of the base's tensors the adapted model does not have (its head)."""
        module = self.network
        if module is None:
            return set()
        known = set(module.state_dict(keep_vars=True))
        return {name for name, place in renames(module, list(names)).items() if place not in known}

    @property
    def network(self) -> nn.Module | None:
        """The network of the adapted model; None if it cannot be built without trust."""
        try:
            return build_skeleton(self.path)
        except SourceError:
            return None


def _with_rows(base: Checkpoint, changed: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """Return the base's config with the size of a vocabulary that the adapter extended."""
    config = dict(base.config or {})
    size = config.get("vocab_size")
    for name, info in changed.items():
        before = base.infos.get(name)
        if before is not None and size is not None and before.shape[:1] == (size,):
            return with_size(config, info.shape[0])
    return config


def _class_of(settings: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
    """Return the class that the adapter was trained with, if its task or its settings say it."""
    table = _CLASSES.get(str(settings.get("task_type")))
    if table is None:
        mapping = settings.get("auto_mapping") or {}
        name = mapping.get("base_model_class")
        known = str(mapping.get("parent_library", "")).startswith("transformers.")
        return name if known and isinstance(name, str) else None
    from transformers.models.auto import modeling_auto

    name = getattr(modeling_auto, table).get(config.get("model_type"))
    return name if isinstance(name, str) else None


def _with_labels(
    config: Mapping[str, Any], changed: Mapping[str, TensorInfo]
) -> Iterator[dict[str, Any]]:
    """Yield the config as it is, then with each number of labels that a new tensor may have."""
    yield dict(config)
    for count in sorted({info.shape[0] for info in changed.values() if info.shape}):
        names = {str(i): f"LABEL_{i}" for i in range(count)}
        labels = {"id2label": names, "label2id": {label: int(i) for i, label in names.items()}}
        rest = {key: value for key, value in config.items() if key != "num_labels"}
        yield {**rest, **labels}
