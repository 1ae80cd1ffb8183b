"""Read a quantised checkpoint as weights, through the library that knows its codes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from typing_extensions import override

from gradmerge.common.errors import ConfigError, SourceError
from gradmerge.common.files import read_json
from gradmerge.common.memory import in_file
from gradmerge.sources.architecture import model_class_of, read_config
from gradmerge.sources.base import AbstractSource, Checkpoint, infos_of, without_aliases
from gradmerge.sources.files import FileCheckpoint, HuggingFace
from gradmerge.sources.quantised import AFTER_LOADING, SETTINGS, TRANSFORMERS, declaration


class DequantisedCheckpoint(FileCheckpoint):
    """The weights that transformers computes from a quantised checkpoint, in temporary files.

    The model is in memory once while it is opened; then its tensors are mapped from files without
    names (`TMPDIR`), so that a killed run leaves none. Names are those that transformers saves.

    Args:
        folder: Hugging Face folder with the codes.
        label: path or hub id that messages show.

    Raises:
        ConfigError: the checkpoint is not quantised, or by a method that cannot be undone.
        SourceError: the library that knows its codes is missing, or refuses them.
    """

    def __init__(self, folder: Path, label: str) -> None:
        FileCheckpoint.__init__(self, sorted(folder.glob("*.safetensors")), folder)
        config = read_json(folder / "config.json") or {}
        self._tensors = {
            name: in_file(tensor.shape, tensor.dtype).copy_(tensor)
            for name, tensor in _dequantised(folder, label).items()
        }
        Checkpoint.__init__(
            self,
            f"{label} (dequantised)",
            infos_of(self._tensors, label),
            folder,
            {key: value for key, value in config.items() if key not in SETTINGS},
        )

    @override
    def read(self, name: str) -> Tensor:
        return self._tensors[name]


def _dequantised(folder: Path, label: str) -> dict[str, Tensor]:
    method = _method(folder, label)
    import transformers
    from transformers.core_model_loading import revert_weight_conversion

    config = read_config(folder)
    options = {}
    try:
        if method in TRANSFORMERS:
            kind = getattr(transformers, TRANSFORMERS[method])
            options["quantization_config"] = kind(dequantize=True)
        model = model_class_of(config, folder).from_pretrained(
            folder, config=config, dtype="auto", local_files_only=True, **options
        )
        if method in AFTER_LOADING:
            model = model.dequantize()
    except Exception as error:  # each library raises its own kinds
        raise SourceError(
            f"{label}: transformers cannot dequantise it ({method}): {type(error).__name__}: "
            f"{error}\nGive the checkpoint that it was made from, in bfloat16, float16 or float32."
        ) from error
    # the conversions that it was loaded with would be reverted to codes
    model._weight_conversions = None
    state = without_aliases(model.state_dict())
    saved: dict[str, Tensor] = revert_weight_conversion(model, state)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in saved.items()}


def _method(folder: Path, label: str) -> str:
    declared = declaration(read_json(folder / "config.json") or {})
    if declared is None:
        raise ConfigError(
            f"Dequantised: expected a quantised checkpoint, got {label}, whose config.json has no "
            "`quantization_config`; give it as HuggingFace."
        )
    method = str(declared.get("quant_method", "bitsandbytes")).lower()
    known = [*TRANSFORMERS, *AFTER_LOADING]
    if method not in known:
        raise ConfigError(
            f"Dequantised: expected a checkpoint of {', '.join(known)}, which transformers can "
            f"dequantise, got {label} of {method}. Give the checkpoint that it was made from."
        )
    return method


@dataclass(frozen=True)
class Dequantised(AbstractSource):
    """The weights that transformers computes from a quantised Hugging Face model.

    FP8 and MXFP4 need no further packages; bitsandbytes and compressed-tensors need theirs. The
    model is in memory once while it is opened, then in temporary files (`TMPDIR`).
    """

    path: str
    """Local folder or hub id (``owner/name``)."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""

    @override
    def open(self) -> Checkpoint:
        label = self.path if self.revision is None else f"{self.path}@{self.revision}"
        return DequantisedCheckpoint(HuggingFace(self.path, self.revision).local_folder(), label)
