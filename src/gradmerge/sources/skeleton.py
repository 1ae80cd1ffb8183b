"""Build networks without weights, and map their parameters to the tensors of a checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gradmerge.common.errors import ConfigError, SourceError, nearest, shorten
from gradmerge.sources.architecture import model_class_of, read_config, refusal
from gradmerge.sources.loader import Fused, Loader, Split


@dataclass(frozen=True)
class Binding:
    """Places of a checkpoint's tensors in a module."""

    parameters: Mapping[str, tuple[str, ...]]
    """Name in the files -> all (tied) names of the parameter in the module."""
    buffers: Mapping[str, str]
    """Name in the files -> name of the persistent buffer in the module."""
    ties: Mapping[str, str]
    """Other names of tied tensors in the files -> the name under which they are merged."""
    missing: tuple[str, ...]
    """Parameters of the module that are not in the files."""
    unused: tuple[str, ...]
    """Tensors in the files that are not in the module."""
    fused: Mapping[str, Fused] = field(default_factory=dict)
    """Parameters that are made of several tensors of the files, or of one in another order, by the
    first of their names in the module."""
    split: Mapping[str, Split] = field(default_factory=dict)
    """Tensors that several parameters are made of, by name in the files."""
    failed: Mapping[str, Exception] = field(default_factory=dict)
    """Why a parameter cannot be made of the tensors in the files, by its name in the module."""
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """All (tied) names of fused parameters and of parts of split tensors, by the first."""

    @cached_property
    def owners(self) -> dict[str, tuple[str, ...]]:
        """Name in the files, of merged tensors -> names of the parameters that they are in."""
        found = dict(self.parameters)
        for place, fused in self.fused.items():
            found.update(dict.fromkeys(fused.parts, self.aliases[place]))
        for name, split in self.split.items():
            found[name] = tuple(alias for place in split.parts for alias in self.aliases[place])
        return found

    @property
    def places(self) -> dict[str, str]:
        """Name in the files, tied or not -> first name in the module."""
        places = {name: aliases[0] for name, aliases in self.parameters.items()}
        places.update(self.buffers)
        return {**places, **{alias: places[kept] for alias, kept in self.ties.items()}}

    @property
    def file_names(self) -> dict[str, str]:
        """First name in the module -> name in the files, that of the merge if it is tied."""
        return {place: name for name, place in reversed(self.places.items())}


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Build modules whose parameters use no memory and whose buffers have their computed values.

    `torch.device("meta")` would also lose non-persistent buffers (rotary frequencies), which no
    checkpoint can restore.
    """
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        original(module, name, param)
        # a parameter that is already on meta may be tied; a new one would untie it
        if param is not None and param.device.type != "meta":
            module._parameters[name] = nn.Parameter(param.to("meta"), requires_grad=False)

    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def build_skeleton(folder: Path, trust_remote_code: bool = False) -> nn.Module:
    """Build the model class that `config.json` names, without weights, in evaluation mode.

    Args:
        folder: Hugging Face folder.
        trust_remote_code: allow modelling code in the folder to run.

    Raises:
        UnknownArchitectureError: transformers does not have the model class.
        SourceError: the config names no model class, or transformers refuses it.
    """
    config = read_config(folder, trust_remote_code)
    model_class = model_class_of(config, folder, trust_remote_code)

    def build(config: Any) -> nn.Module:
        with _parameters_on_meta():
            if hasattr(model_class, "_from_config"):
                # float32 whatever the config says, which would round constants in buffers
                # (Gemma's embedding scale)
                return cast("nn.Module", model_class._from_config(config, dtype=torch.float32))
            return cast(
                "nn.Module", model_class.from_config(config, trust_remote_code=trust_remote_code)
            )

    try:
        module = build(config)
    except Exception as error:  # networks check their config in many ways, or not at all
        kind, what = type(config), f"cannot build {model_class.__name__} from it"
        attempt = lambda fields: build(kind.from_dict(fields))  # noqa: E731
        raise refusal(folder, what, error, attempt) from error
    module.tie_weights()  # type: ignore[operator]
    _fill_buffers(module)
    _compute_unsaved(module)
    return module.eval()


def _compute_unsaved(module: nn.Module) -> None:
    """Turn parameters that transformers computes and never saves (positions) into buffers."""
    unsaved = set(getattr(module, "_keys_to_ignore_on_save", None) or ())
    for place in unsaved.intersection(name for name, _ in module.named_parameters()):
        owner, _, name = place.rpartition(".")
        layer = module.get_submodule(owner)
        shape = layer.get_parameter(name).shape
        drawn = []
        for seed in range(2):
            layer._parameters[name] = nn.Parameter(torch.zeros(shape), requires_grad=False)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                module._init_weights(layer)  # type: ignore[operator]
            drawn.append(layer.get_parameter(name).detach())
        if torch.equal(*drawn):  # else it is a weight, which a file must have
            del layer._parameters[name]
            layer.register_buffer(name, drawn[0])
        else:
            layer._parameters[name] = nn.Parameter(drawn[0].to("meta"), requires_grad=False)


def _fill_buffers(module: nn.Module) -> None:
    """Give buffers that were made like a parameter, and so without values, those of an empty file.

    Raises:
        ConfigError: no file has the values.
    """
    stored = module.state_dict(keep_vars=True)
    for place, buffer in list(module.named_buffers()):
        if not buffer.is_meta:
            continue
        owner, _, name = place.rpartition(".")
        if place not in stored:
            raise ConfigError(
                f"{type(module).__name__}: expected buffers that do not depend on parameters, got "
                f"{place}, which is computed from some and is not in the files.\n"
                "Merge it with fixed coefficients (`gradmerge merge`)."
            )
        module.get_submodule(owner)._buffers[name] = torch.zeros_like(buffer, device="cpu")


def _old_style(module: nn.Module, name: str) -> str | None:
    """Name the function of torch.nn.utils that computes an attribute before each call."""
    hooks = {
        type(hook).__name__: getattr(hook, "name", None)
        for hook in module._forward_pre_hooks.values()
    }
    for kind, util in (("WeightNorm", "weight_norm"), ("SpectralNorm", "spectral_norm")):
        if hooks.get(kind) == name:
            return util
    return "prune" if f"{name}_mask" in module._buffers else None


def strip_weights(module: nn.Module) -> nn.Module:
    """Copy a module without its weights; ties are kept and buffers copied.

    Raises:
        ConfigError: an attribute is a tensor computed from parameters.
    """
    for path, owner in module.named_modules():
        for name, value in vars(owner).items():
            if any(isinstance(leaf, Tensor) and not leaf.is_leaf for leaf in tree_leaves(value)):
                where = f"{path}.{name}" if path else name
                util = _old_style(owner, name)
                if util is not None:
                    how = f"computed from others (as by the old torch.nn.utils.{util})"
                    remedy = (
                        "Use torch.nn.utils.parametrizations instead, or make it a plain weight "
                        "(remove_weight_norm, remove_spectral_norm, prune.remove) in every source"
                    )
                else:
                    how = "computed (such as an activation kept by an earlier pass)"
                    remedy = (
                        "If no later pass reads it, set it to None in every source before the "
                        "merge; otherwise compute it in the network's forward"
                    )
                raise ConfigError(
                    f"{type(module).__name__}: expected a parameter, but {where} is {how} and "
                    f"would not follow merged parameters. {remedy}."
                )
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        for parameter in module.parameters()
    }
    return copy.deepcopy(module, memo).eval()


def bind(
    module: nn.Module,
    names: Sequence[str],
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> Binding:
    """Match the tensor names of a checkpoint with the parameters and buffers of a module.

    Equal names match; other names are renamed, and their tensors fused or split, as transformers
    does when it loads the class.

    Args:
        module: the network.
        names: names of the tensors in the files.
        shapes: their shapes, which tell in which of two orders some checkpoints store experts.
            Default: as the library saves them.
    """
    groups = _groups(module)
    canonical = {alias: aliases[0] for aliases in groups for alias in aliases}
    by_canonical = {aliases[0]: tuple(aliases) for aliases in groups}
    persistent = set(module.state_dict(keep_vars=True))
    module_buffers = {name for name, _ in module.named_buffers() if name in persistent}
    buffers: dict[str, str] = {}
    unused = []
    found: dict[str, dict[str, str]] = {}  # tied group -> place in the module -> name in the files
    loader = Loader(module)
    placed = loader.places(names, shapes)
    converted, failed = loader.conversions(placed, shapes or {})
    fused = {canonical[c.place]: c for c in converted if isinstance(c, Fused)}
    split = {c.name: c for c in converted if isinstance(c, Split)}
    made = [*fused, *(place for c in split.values() for place in c.parts)]
    inside = {name for c in fused.values() for name in c.parts} | split.keys()
    for name in names:
        target, rule = placed[name].name, placed[name].conversion
        if rule is not None:
            if name not in inside and rule.target not in failed:
                unused.append(name)
        elif target in canonical:
            found.setdefault(canonical[target], {})[target] = name
        elif target in module_buffers:
            buffers[name] = target
        else:
            unused.append(name)
    parameters: dict[str, tuple[str, ...]] = {}
    ties: dict[str, str] = {}
    for key, places in found.items():
        # merged under the name that transformers keeps when it saves a tied tensor
        kept = places.get(key) or next(iter(places.values()))
        parameters[kept] = by_canonical[key]
        ties.update({name: kept for name in places.values() if name != kept})
    there = {*found, *(canonical[place] for place in made), *failed}
    missing = tuple(key for key in by_canonical if key not in there)
    aliases = {place: by_canonical[canonical[place]] for place in made}
    return Binding(parameters, buffers, ties, missing, tuple(unused), fused, split, failed, aliases)


def _groups(module: nn.Module) -> list[list[str]]:
    groups: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return list(groups.values())


def tied_groups(module: nn.Module) -> list[list[str]]:
    """Return the names of each tied parameter, the one that transformers loads for all first."""
    targets = getattr(module, "all_tied_weights_keys", None) or {}
    groups = (group for group in _groups(module) if len(group) > 1)
    return [sorted(group, key=targets.__contains__) for group in groups]


def renames(module: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """Return the name in the module of each name in the files.

    Tensors that are fused or split get the name that they would have without that.
    """
    return {name: place.name for name, place in Loader(module).places(names).items()}


@dataclass(frozen=True)
class Network:
    """A network without weights, and the places of a checkpoint's tensors in it."""

    module: nn.Module
    binding: Binding

    @classmethod
    def bound(
        cls,
        module: nn.Module,
        names: Sequence[str],
        label: str = "the model",
        shapes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> Network:
        """Bind a network to a checkpoint that has a tensor for every parameter of it.

        Args:
            module: the network.
            names: names of the tensors in the files.
            label: label of the checkpoint, for the message.
            shapes: shapes of the tensors (see `bind`).

        Raises:
            SourceError: parameters of the module are missing in the checkpoint.
            ConfigError: the way in which transformers makes a parameter of tensors is not known.
        """
        binding = bind(module, names, shapes)
        if binding.failed:
            place, reason = next(iter(binding.failed.items()))
            raise ConfigError(
                f"{label}: {type(module).__name__} makes {len(binding.failed)} parameters of "
                f"tensors of other shapes in a way that cannot be followed ({place}: "
                f"{reason or type(reason).__name__}), so it cannot be "
                "learned.\nMerge it with fixed coefficients (`gradmerge merge`)."
            )
        if binding.missing:
            raise SourceError(
                f"{label}: {len(binding.missing)} parameters of {type(module).__name__} "
                f"have no tensor: {shorten(list(binding.missing))}."
                f"{nearest(binding.missing[0], binding.unused)} They would have random values."
            )
        return cls(module, binding)

    def input_axis(self, name: str, shape: Sequence[int]) -> tuple[int, bool]:
        """Return the axis of a tensor in the files that runs over the layer's inputs.

        Args:
            name: the tensor.
            shape: its shape.

        Returns:
            The axis, of one expert if experts are stacked, and whether they are.
        """
        place = self.binding.owners[name][0]
        axis, stacked = input_axis(self.module, place), has_experts(self.module, place)
        fused = self.binding.fused.get(place)
        if fused is None:
            return axis, stacked
        whole, window = self.module.get_parameter(place).shape, fused.parts[name]
        own = window.axis_of(whole, axis + 1 if stacked else axis)
        if stacked and len(shape) == len(whole):  # stacked in the files, too, in another order
            return (axis if own is None else own - 1), True
        return (axis if own is None else own), False


def has_experts(module: nn.Module, name: str) -> bool:
    """Return whether the first axis of parameter `name` counts experts, as transformers has them.

    Their weights are `[experts, out, in]` or `[experts, in, out]`, and biases `[experts, out]`.
    """
    owner = type(module.get_submodule(name.rpartition(".")[0])).__name__
    bias = "bias" in name.rpartition(".")[-1]
    return "Experts" in owner and module.get_parameter(name).dim() == (2 if bias else 3)


def input_axis(module: nn.Module, name: str) -> int:
    """Return the axis of parameter `name` that runs over the layer's inputs (its columns).

    1 for `[out, in, ...]` layers; 0 for layers that store `[in, out, ...]` (transposed
    convolutions, GPT-2's Conv1D, and some stacked experts, of which it is the axis of one).
    """
    if has_experts(module, name):
        experts = module.get_submodule(name.rpartition(".")[0])
        turned = getattr(experts, "is_transposed", type(experts).__name__ == "Llama4TextExperts")
        return 0 if turned else 1
    owner = module.get_submodule(name.rpartition(".")[0])
    kind = f"{type(owner).__module__}.{type(owner).__name__}"
    convolutions = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    transposed = isinstance(owner, convolutions) or kind == "transformers.pytorch_utils.Conv1D"
    return 0 if transposed else 1


def empty_like_parameter(parameter: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a placeholder of this shape, dtype and device that stores a single number."""
    return torch.zeros((), dtype=dtype, device=device).expand(parameter.shape)
