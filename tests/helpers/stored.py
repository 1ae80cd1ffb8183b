"""Merges of saved networks by transformers alone: an oracle for tensors that it fuses or splits."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call


def eager(network: Any) -> Any:
    """Run experts with plain operations, of which alone float64 ones exist."""
    if hasattr(network, "set_experts_implementation"):
        network.set_experts_implementation("eager")
    return network


def rewrite(folder: Path, change: Any) -> None:
    """Replace every tensor of a folder by `change(name, tensor)`."""
    for file in folder.glob("*.safetensors"):
        tensors = {name: change(name, tensor) for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})


def stored(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder."""
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


class Suite:
    """Relatives of a network in folders, with their exact merge by transformers' own loading.

    A folder in which every tensor is filled with its number tells which entries of the loaded
    network are of which stored tensor, without any knowledge of how they get there.

    Args:
        network: the base, in evaluation mode.
        root: an empty folder.
        names: names of the sources.
    """

    def __init__(self, network: nn.Module, root: Path, names: tuple[str, ...] = ("a", "b")) -> None:
        self.kind: Any = type(network)
        self.base = root / "base"
        self.dtype = next(network.parameters()).dtype
        self.computed = set(network._keys_to_ignore_on_save or ())
        """Parameters that transformers computes when it loads the network."""
        network.save_pretrained(self.base)
        generator = torch.Generator().manual_seed(1)
        self.sources, states = {}, {}
        for name in names:
            other = copy.deepcopy(network)
            with torch.no_grad():
                for place, p in other.named_parameters():
                    if place in self.computed:
                        continue
                    noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
                    p.add_((0.1 * noise).to(p.dtype))
            other.save_pretrained(root / name)
            self.sources[name] = root / name
            states[name] = other.state_dict()
        self.names = list(stored(self.base))
        marks = root / "marks"
        shutil.copytree(self.base, marks)
        number = {name: i for i, name in enumerate(self.names)}
        rewrite(marks, lambda n, t: torch.full_like(t, number[n]) if t.is_floating_point() else t)
        self.loaded = {name: self.load(path) for name, path in self.sources.items()}
        self.network = self.load(self.base)
        self.faithful = all(
            torch.equal(tensor, states[name][place].to(tensor.dtype))
            for name, model in self.loaded.items()
            for place, tensor in model.state_dict().items()
        )
        """Whether transformers loads what it has saved, up to float32."""
        self.marks = dict(self.load(marks).named_parameters())

    def load(self, folder: Path) -> Any:
        """Load a folder with plain transformers, in the dtype of its files."""
        kept = self.kind._keep_in_fp32_modules, self.kind._keep_in_fp32_modules_strict
        self.kind._keep_in_fp32_modules = self.kind._keep_in_fp32_modules_strict = None
        try:
            return eager(self.kind.from_pretrained(folder, dtype=self.dtype).eval())
        finally:
            self.kind._keep_in_fp32_modules, self.kind._keep_in_fp32_modules_strict = kept

    def recipe(self, **options: Any) -> dict[str, Any]:
        """Arguments of a recipe."""
        sources = {name: str(path) for name, path in self.sources.items()}
        return {"sources": sources, "base": str(self.base), **options}

    def thetas(self, coefficients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The merged parameters of the network, for coefficients `[sources]` by stored name."""
        known = [coefficients.get(n, torch.zeros(len(self.sources)).double()) for n in self.names]
        table = torch.stack(known, dim=1)
        thetas = {}
        for place, parameter in self.network.named_parameters():
            if place in self.computed or not parameter.is_floating_point():
                continue
            chosen = table[:, self.marks[place].detach().round().long()]
            base = parameter.detach()
            theta = base.clone()
            for c, model in zip(chosen, self.loaded.values(), strict=True):
                theta = theta + c * (model.get_parameter(place).detach() - base)
            thetas[place] = theta
        return thetas

    def run(self, coefficients: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Any:
        """Run the merged network, differentiable in the coefficients."""
        return functional_call(self.network, self.thetas(coefficients), (), dict(batch))


def loss_of(logits: Tensor) -> Tensor:
    """A smooth loss of any logits."""
    weights = torch.linspace(-1, 1, logits.shape[-1], dtype=logits.dtype)
    return (logits.log_softmax(-1) * weights).mean()
