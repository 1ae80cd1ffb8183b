"""Check that a config describes the tensors beside it, however many sources agree on both."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from gradmerge.common.errors import Problem, SourceError, nearest, shorten
from gradmerge.sources.architecture import UnknownArchitectureError
from gradmerge.sources.base import Checkpoint, TensorInfo
from gradmerge.sources.loader import Loader
from gradmerge.sources.skeleton import Binding, bind

# Sizes that weights show, in the spelling of most models.
_HIDDEN = ("hidden_size", "n_embd", "d_model", "dim")
_INNER = (
    *("vocab_size", "type_vocab_size", "intermediate_size", "d_ff", "n_inner", "ffn_dim"),
    *("encoder_ffn_dim", "decoder_ffn_dim"),
)
_DEPTHS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"),
    *("encoder_layers", "decoder_layers"),
)
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def disagreements(
    module: nn.Module,
    binding: Binding,
    infos: Mapping[str, TensorInfo],
    label: str,
    config: Mapping[str, Any] | None = None,
) -> list[Problem]:
    """Compare the network that a config describes with the tensors that it should get.

    Args:
        module: the network, without weights.
        binding: the places of the tensors in it.
        infos: headers of the tensors by name.
        label: label of the checkpoint.
        config: its `config.json`, if the network was built from it.

    Returns:
        Every difference in shape, parameters without tensors, and layers without a place.
    """
    compared = _Compared(module, binding, infos, label, config)
    return [*compared.wrong_shapes(), *compared.missing(), *compared.surplus()]


@dataclass(frozen=True)
class _Compared:
    """A network and the tensors that it should get (see `disagreements`)."""

    module: nn.Module
    binding: Binding
    infos: Mapping[str, TensorInfo]
    label: str
    config: Mapping[str, Any] | None

    def wrong_shapes(self) -> Iterator[Problem]:
        """Yield tensors of other shapes, once for each size that differs."""
        module, infos = self.module, self.infos
        wanted = {
            name: tuple(tensor.shape)
            for tensors in (module.named_parameters(remove_duplicate=False), module.named_buffers())
            for name, tensor in tensors
        }
        shapes = {name: wanted[place] for name, place in self.binding.places.items()}
        for fused in self.binding.fused.values():
            shapes.update({name: window.shape for name, window in fused.parts.items()})
        shapes.update({name: split.shape for name, split in self.binding.split.items()})
        by_size: dict[tuple[int, ...], list[str]] = defaultdict(list)
        for name, shape in shapes.items():
            if name in infos and infos[name].shape != shape:
                by_size[_changed(shape, infos[name].shape)].append(name)
        for sizes, names in by_size.items():
            info = infos[names[0]]
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            yield self._problem(
                _fields(self.config, sizes, infos) or names[0],
                f"the sizes of the tensors: {info.shape} for {info.name} in {info.file}{more}",
                f"{shapes[names[0]]}",
                "transformers would refuse the merge, or give it random values.",
            )

    def missing(self) -> Iterator[Problem]:
        """Yield the parameters and BatchNorm statistics without a tensor, or with too few."""
        for place, reason in self.binding.failed.items():
            if isinstance(reason, SourceError):
                expected, got = str(reason).split(", got ")
                why = "transformers makes one parameter of all of them."
                yield self._problem(place, expected.removeprefix("expected "), got, why)
                return
        found = set(self.binding.places.values())
        statistics = [
            name
            for name, _ in self.module.named_buffers()
            if name.endswith(("running_mean", "running_var")) and name not in found
        ]
        lost = [*self.binding.missing, *statistics]
        if lost:
            depths = [depth for name in lost for depth in _lengths(self.module, name)]
            yield self._problem(
                _depths(self.config, depths) or "parameters",
                f"a tensor for every parameter of {type(self.module).__name__}",
                f"{len(lost)} that have no tensor: {shorten(lost)}",
                f"They would have random values.{nearest(lost[0], self.binding.unused)}",
            )

    def surplus(self) -> Iterator[Problem]:
        """Yield layers beyond those of the network: known names but for a number."""
        if not self.binding.unused:
            return
        loader = Loader(self.module)
        known = {_NUMBER.sub("*", place) for place in loader.known}
        places = loader.places(list(self.binding.unused))
        extra = [
            name
            for name, place in places.items()
            if (_NUMBER.sub("*", place.name) in known or 0 in _lengths(self.module, place.name))
            and not loader.ignores(place.name)
        ]
        if extra:
            depths = [d for name in extra for d in _lengths(self.module, places[name].name)]
            yield self._problem(
                _depths(self.config, depths) or "layers",
                f"a place in {type(self.module).__name__} for every layer in the files",
                f"none for {len(extra)} tensors: {shorten(extra)}",
                "transformers would drop these layers.",
            )

    def _problem(self, what: str, expected: str, got: str, why: str) -> Problem:
        where = self.label if self.config is None else f"{self.label}/config.json"
        todo = "Correct the config, or give the weights that belong to it."
        return Problem("config", where, what, expected, got, f"{why} {todo}")


def _changed(wanted: tuple[int, ...], stored: tuple[int, ...]) -> tuple[int, ...]:
    if len(wanted) != len(stored):
        return ()
    return tuple(w for w, s in zip(wanted, stored, strict=True) if w != s)


def _lengths(module: nn.Module, name: str) -> Iterator[int]:
    """Yield how many modules the network has in each list that a name goes through."""
    for match in _NUMBER.finditer(name):
        parent: Any = module
        for part in name[: match.start() - 1].split("."):
            parent = getattr(parent, part, None)
        if isinstance(parent, (nn.ModuleList, nn.Sequential)):
            yield len(parent)


def _fields(
    config: Mapping[str, Any] | None, values: Iterable[int], infos: Mapping[str, TensorInfo]
) -> str:
    """Return the fields to blame for sizes that no tensor has, as `name (got value)`."""
    stored = {size for info in infos.values() for size in info.shape}
    wanted = set(values) - stored
    found = {
        key: value
        for key, value in _numbers(config or {})
        if value in wanted and not re.search("token|_id$|dropout", key)
    }
    labels = (config or {}).get("id2label")
    if not found and isinstance(labels, Mapping) and len(labels) in wanted:
        return f"id2label (got {len(labels)} labels)"
    return " or ".join(f"{key} (got {value})" for key, value in found.items())


def _depths(config: Mapping[str, Any] | None, values: Iterable[int]) -> str:
    """Return the fields to blame for a number of layers."""
    wanted = set(values)
    numbers = [(k, v) for k, v in _numbers(config or {}) if v in wanted and "layer" in k]
    return " or ".join(f"{key} (got {value})" for key, value in numbers)


def _numbers(config: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, int]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and key.endswith("_config"):
            yield from _numbers(value, f"{above}{key}.")
        elif isinstance(value, int) and not isinstance(value, bool):
            yield f"{above}{key}", value


def check_agreement(
    checkpoints: Mapping[str, Checkpoint],
    sources: Sequence[str],
    build: Callable[[Path], nn.Module],
    private: Sequence[str] = (),
    sure: bool = True,
) -> list[Problem]:
    """Compare configs with the tensors beside them; those of all sources may be wrong alike.

    Args:
        checkpoints: opened checkpoints by name; the first is the reference.
        sources: names of the checkpoints that may serve a task.
        build: returns the network of a folder without weights, which is not changed.
        private: regular expressions of tensors that stay with their task.
        sure: build the network of every checkpoint, not only of those that look wrong.
    """
    reference, serving = next(iter(checkpoints.values())), [checkpoints[n] for n in sources]
    # tasks run the sources' network if they have heads of their own
    alike = {reference.label: reference}
    if private:
        alike = {checkpoint.label: checkpoint for checkpoint in serving}
    problems: list[Problem] = []
    seen: list[Any] = []
    for checkpoint in alike.values():
        what = (_sizes(checkpoint.config), [checkpoint.infos[n].shape for n in checkpoint.infos])
        if checkpoint.folder is None or not checkpoint.config or what in seen:
            continue
        seen.append(what)
        if sure or looks_wrong(checkpoint):
            with suppress(UnknownArchitectureError):  # its own code, which need not run
                problems += _of(checkpoint, build(checkpoint.folder))
    return problems


def _of(checkpoint: Checkpoint, module: nn.Module) -> list[Problem]:
    shapes = {name: info.shape for name, info in checkpoint.infos.items()}
    binding = bind(module, list(shapes), shapes)
    return disagreements(module, binding, checkpoint.infos, checkpoint.label, checkpoint.config)


def _sizes(config: Mapping[str, Any] | None) -> Any:
    """Return what sets the sizes of a network: all of its config but the names of labels."""
    fields = {k: v for k, v in (config or {}).items() if k not in ("id2label", "label2id")}
    labels = (config or {}).get("id2label")
    return fields, len(labels) if isinstance(labels, Mapping) else labels


def looks_wrong(checkpoint: Checkpoint) -> bool:
    """Return whether a config may not describe the tensors, judged by its plainest numbers.

    It takes the network to know (`disagreements`), but transformers takes longer to import than a
    small merge. Sizes in the config must occur together in the shape of a tensor, every number of
    layers as the length of a list. What escapes is found when the merge is opened, before it gets
    its name.
    """
    config = checkpoint.config
    if not config or not checkpoint.infos:
        return False
    classes, kind = config.get("architectures"), config.get("model_type", "")
    if not isinstance(classes, (list, type(None))) or not isinstance(kind, str):
        return True
    lists: dict[str, set[str]] = defaultdict(set)
    for name in checkpoint.infos:
        match = _NUMBER.search(name)
        if match is not None:
            lists[name[: match.start()]].add(match.group())
    lengths = {len(numbers) for numbers in lists.values()}
    return any(_is_suspect(part, checkpoint.infos, lengths) for part in _parts(config))


def _is_suspect(
    config: Mapping[str, Any], infos: Mapping[str, TensorInfo], lengths: set[int]
) -> bool:
    numbers = {key: value for key, value in config.items() if type(value) is int and value > 0}
    if any(type(config.get(key, 0)) not in (int, type(None)) for key in (*_INNER, *_DEPTHS)):
        return True
    biases = any(key.endswith("bias") and value is True for key, value in config.items())
    if biases and not any(name.endswith("bias") for name in infos):
        return True
    shapes = {info.shape for info in infos.values()}
    hidden = {numbers[key] for key in _HIDDEN if key in numbers}
    # some files store two or three matrices as one
    fused = any(re.search(r"gate_up|\.Wi\.|w12|qkv", name) for name in infos)
    for key in _INNER:
        value = numbers.get(key)
        wanted = () if not value else (value, 2 * value) if fused else (value,)
        if value and not any(_holds(shape, wanted, hidden) for shape in shapes):
            return True
    depths = [config[key] for key in _DEPTHS if config.get(key) is not None]
    if lengths and any(depth not in lengths for depth in depths):
        return True
    heads = numbers.get("num_attention_heads")
    if heads and "hidden_size" in numbers:
        groups = numbers.get("num_key_value_heads", heads)
        width = groups * (numbers.get("head_dim") or numbers["hidden_size"] // heads)
        keys = {info.shape[0] for name, info in infos.items() if name.endswith("k_proj.weight")}
        if keys and width not in keys:
            return True
    labels = config.get("id2label")
    if not isinstance(labels, Mapping) or not _is_classifier(config):
        return labels is not None and not isinstance(labels, Mapping)
    return not any(len(labels) in shape for shape in shapes)


def _holds(shape: tuple[int, ...], inner: tuple[int, ...], hidden: set[int]) -> bool:
    """Return whether a tensor has one of the inner sizes, and next to it the hidden size."""
    return any(
        size in inner and (not hidden or hidden.intersection((*shape[:i], *shape[i + 1 :])))
        for i, size in enumerate(shape)
    )


def _is_classifier(config: Mapping[str, Any]) -> bool:
    named = str(config.get("architectures"))
    return bool(re.search(r"For(Sequence|Token|Image|Audio)\w*Classification", named))


def _parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield config
    for key, value in config.items():
        if isinstance(value, Mapping) and key.endswith("_config"):
            yield from _parts(value)
