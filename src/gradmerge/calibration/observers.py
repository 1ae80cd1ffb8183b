"""What the linear layers of a network see: rows of inputs, and of the gradients of outputs.

A layer is linear in its weight `[groups, out, in]` where each of its outputs is such a product with
rows of its input: `nn.Linear`, transformers' `Conv1D`, and 1-D and 2-D convolutions, whose rows are
the patches below the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from gradmerge.engine.plan import Plan
from gradmerge.sources.skeleton import input_axis


@dataclass(frozen=True)
class LinearLayer:
    """A merged tensor that is the weight of linear layers alone."""

    name: str
    """The tensor's name."""
    places: tuple[str, ...]
    """Names of the modules whose weight it is (several where it is tied)."""
    modules: tuple[nn.Module, ...]
    axis: int
    """1 for a weight `[out, in, ...]`, 0 for `[in, out]`."""


def linear_layers(plan: Plan) -> dict[str, LinearLayer]:
    """By the tensor's name, in the order of the plan; private tensors are none of the merge's.

    A weight that anything else uses too (an embedding tied to the output layer) is left out.
    """
    skeleton, binding = plan.skeleton, plan.binding
    assert skeleton is not None
    assert binding is not None
    found = {}
    for name in plan.tensors:
        owners = []
        for place in binding.parameters.get(name, ()):
            owner, _, attribute = place.rpartition(".")
            module = skeleton.get_submodule(owner)
            owners.append((owner, module, attribute == "weight" and is_linear(module)))
        if owners and all(linear for _, _, linear in owners):
            places = tuple(owner for owner, _, _ in owners)
            axis = input_axis(skeleton, binding.parameters[name][0])
            found[name] = LinearLayer(name, places, tuple(m for _, m, _ in owners), axis)
    return found


def _is_conv1d_of_transformers(module: nn.Module) -> bool:
    kind = type(module)
    return kind.__module__ == "transformers.pytorch_utils" and kind.__name__ == "Conv1D"


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a layer that is linear in its weight."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d)
    return isinstance(module, kinds) or _is_conv1d_of_transformers(module)


_KINDS = ("torch.nn.modules.linear", "torch.nn.modules.conv", "transformers.pytorch_utils")


def input_rows(module: nn.Module, inputs: Tensor, mask: Tensor | None) -> Tensor:
    """Rows that the layer's weight is multiplied with, `[groups, rows, in]`.

    Args:
        module: the layer.
        inputs: what it is called with.
        mask: `[batch, tokens]`, 0 on padding; rows of padding are left out.
    """
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return _patches(module, inputs)
    return _tokens(inputs, mask)[None]


def output_rows(module: nn.Module, outputs: Tensor, mask: Tensor | None) -> Tensor:
    """Rows of the layer's outputs (or their gradients) in the same order, `[groups, rows, out]`."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        outputs = outputs if _has_batch(module, outputs) else outputs[None]
        split = outputs.flatten(2).unflatten(1, (module.groups, -1))
        return split.permute(1, 0, 3, 2).flatten(1, 2)
    return _tokens(outputs, mask)[None]


def _tokens(values: Tensor, mask: Tensor | None) -> Tensor:
    kept, _ = without_padding(values, mask, -1)
    return kept.reshape(-1, values.shape[-1])


def without_padding(values: Tensor, mask: Tensor | None, axis: int) -> tuple[Tensor, int]:
    """Values at tokens that are no padding, and where their axis of channels is then (negative).

    Of the other axes, batch and tokens are found by their sizes, as

        [batch, tokens, ...], [batch, ..., tokens, ...], [tokens, batch, ...], [batch * tokens, ...]

    and go as one axis to the front; the last is read as a `flatten` of the first two. Where none
    fits, the values come back as they are: outputs that are pooled, or of another length (a
    convolution with a stride), hold no padding to leave out. So they do where several fit that take
    different rows (as many heads as tokens, as many examples as tokens): rows of padding then
    count, but none is lost.

    Args:
        values: what a layer gives or is given.
        mask: `[batch, tokens]`, 0 on padding.
        axis: of channels, which is no batch and holds no tokens.
    """
    channels = axis % values.dim() if values.dim() else 0
    others = [i for i in range(values.dim()) if i != channels]
    if mask is None or mask.dim() != 2 or not others:
        return values, channels - values.dim()
    readings = list(_readings([values.shape[i] for i in others], mask != 0))
    everywhere = [_over(values, [others[i] for i in axes], kept) for axes, kept in readings]
    if not readings or any(not kept.equal(everywhere[0]) for kept in everywhere[1:]):
        return values, channels - values.dim()
    lead, kept = [others[i] for i in readings[0][0]], readings[0][1]
    rest = [i for i in range(values.dim()) if i not in lead]
    return values.permute(*lead, *rest)[kept], rest.index(channels) - len(rest)


def _readings(sizes: Sequence[int], kept: Tensor) -> Iterator[tuple[list[int], Tensor]]:
    """Axes that batch and tokens may be (or both in one), and which rows along them are kept."""
    batch, tokens = kept.shape
    if sizes[0] == batch:
        yield from (([0, i], kept) for i in range(1, len(sizes)) if sizes[i] == tokens)
    if list(sizes[:2]) == [tokens, batch]:
        yield [0, 1], kept.mT
    if sizes[0] == batch * tokens:
        yield [0], kept.flatten()


def _over(values: Tensor, axes: Sequence[int], kept: Tensor) -> Tensor:
    """What is kept along some axes (in ascending order), at every entry; no copy."""
    shape = [size if i in axes else 1 for i, size in enumerate(values.shape)]
    return kept.reshape(shape).expand(values.shape)


def _has_batch(module: nn.Module, values: Tensor) -> bool:
    """Whether inputs or outputs of a linear layer or convolution are several examples'; otherwise
    their first axis is that of features or channels.
    """
    return values.dim() > 1 + len(_kernel(module))


def _kernel(module: nn.Module) -> tuple[int, ...]:
    return module.kernel_size if isinstance(module, (nn.Conv1d, nn.Conv2d)) else ()


def _patches(module: nn.Conv1d | nn.Conv2d, inputs: Tensor) -> Tensor:
    inputs = inputs if _has_batch(module, inputs) else inputs[None]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = functional.pad(inputs, module._reversed_padding_repeated_twice, mode=mode)
    kernel, dilation, stride = module.kernel_size, module.dilation, module.stride
    if isinstance(module, nn.Conv1d):
        padded = padded.unsqueeze(2)
        kernel, dilation, stride = ((1, size[0]) for size in (kernel, dilation, stride))
    columns = functional.unfold(padded, kernel, dilation, 0, stride)
    split = columns.unflatten(1, (module.groups, -1))  # [batch, groups, in, positions]
    return split.permute(1, 0, 3, 2).flatten(1, 2)


def is_plain(module: Any, args: Any, kwargs: Mapping[str, Any], output: Tensor) -> bool:
    """Return whether an output is what the layer's kind makes of its input, stored weight and bias
    (to `tolerance_of`). It is not with weight standardisation, or with a scale of the layer's own.
    """
    kind: Any = next(kind for kind in type(module).__mro__ if kind.__module__ in _KINDS)
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):  # `forward` calls a subclass's
        inputs = first_argument(args, kwargs)
        expected = kind._conv_forward(module, inputs, module.weight, module.bias)
    else:
        expected = kind.forward(module, *args, **kwargs)
    if expected.shape != output.shape:
        return False
    apart = (output.detach().float() - expected.detach().float()).norm()
    return float(apart) <= tolerance_of(output) * float(expected.detach().float().norm())


def tolerance_of(output: Tensor) -> float:
    """How far a layer's output may be from what it should be, relative to its norm: 5e-3, for
    convolutions on GPUs multiply with 10 bits (TF32); 0.03 in 16 bits.
    """
    return 5e-3 if output.element_size() > 2 else 0.03


Hook = Callable[[nn.Module, Callable[[Tensor], Any]], RemovableHandle]


def before_call(module: nn.Module, see: Callable[[Tensor], None]) -> RemovableHandle:
    """Show a function what a module is called with."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        see(first_argument(args, kwargs))

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def after_call(module: nn.Module, see: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
    """Show a function what a module puts out; a tensor that it returns takes the output's place."""

    def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor | None:
        return see(output)

    return module.register_forward_hook(hook)


@contextmanager
def removing(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove hooks at the end of the context."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Enough(Exception):  # noqa: N818 (it is no error)
    """The layers that are watched have run: what follows of the pass is not needed."""


def mask_of(skeleton: nn.Module, batch: Mapping[str, Any]) -> Tensor | None:
    """Which tokens are no padding; unknown with a decoder, whose own tokens are others."""
    decodes = getattr(getattr(skeleton, "config", None), "is_encoder_decoder", False)
    return None if decodes else batch.get("attention_mask")


class Grams:
    """Sums over rows `X^T X` of layers' inputs and, if asked for, `D^T D` of their outputs'
    gradients.

    Args:
        layers: by tensor.
        outputs: also of the outputs' gradients. Otherwise a layer that turns out not to be linear
            in its stored weight (weight standardisation, a scale of its own) is left out: its
            inputs say nothing of that weight.
    """

    def __init__(self, layers: Mapping[str, LinearLayer], outputs: bool = False) -> None:
        self._layers, self._outputs = layers, outputs
        self.others: set[str] = set()
        """Tensors whose layer is not linear in them."""
        self.inputs: dict[str, Tensor] = {}
        """`[groups, in, in]` by tensor."""
        self.outputs: dict[str, Tensor] = {}
        """`[groups, out, out]` by tensor."""
        self.rows: dict[str, int] = {}
        """Rows of inputs by tensor."""
        self.mask: Tensor | None = None
        """`[batch, tokens]` of the batch that runs, 0 on padding."""
        self._verified: set[str] = set()

    def watching(self) -> AbstractContextManager[None]:
        """Within the context forward passes (and their backward) are taken in."""
        handles = []
        for name, layer in self._layers.items():
            for module in layer.modules:
                handles.append(before_call(module, partial(self._take_input, name, module)))
                take = self._take_output if self._outputs else self._verify
                hook = partial(take, name)
                handles.append(module.register_forward_hook(hook, with_kwargs=True))
        return removing(handles)

    def _take_input(self, name: str, module: nn.Module, inputs: Tensor) -> None:
        if name in self.others:
            return
        rows = input_rows(module, inputs.detach(), self.mask)
        _add(self.inputs, name, rows.mT @ rows)
        self.rows[name] = self.rows.get(name, 0) + rows.shape[1]

    def _verify(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        """Leave the layer out unless its first output is `x W^T + b`."""
        if name in self._verified or name in self.others or not output.numel():
            return
        self._verified.add(name)
        if not is_plain(module, args, kwargs, output):
            self.others.add(name)
            self.inputs.pop(name, None)
            self.rows.pop(name, None)

    def _take_output(self, name: str, module: nn.Module, *_: Any) -> None:
        output: Tensor = _[-1]
        if not output.requires_grad:
            return
        mask = self.mask

        def take(grad: Tensor) -> None:
            rows = output_rows(module, grad, mask)
            _add(self.outputs, name, rows.mT @ rows)

        output.register_hook(take)


def first_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """What a layer is called with."""
    return args[0] if args else next(iter(kwargs.values()))


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    if name in sums:
        sums[name] += value
    else:
        sums[name] = value


def blocks(skeleton: nn.Module, layers: Mapping[str, LinearLayer]) -> dict[str, str]:
    """The block of each layer: the innermost member of an `nn.ModuleList` that holds it; '' where
    there is none. A tied weight is of its first layer's block.
    """
    found = {}
    for name, layer in layers.items():
        parts = layer.places[0].split(".")
        inside = [
            ".".join(parts[:depth])
            for depth in range(1, len(parts) + 1)
            if isinstance(skeleton.get_submodule(".".join(parts[: depth - 1])), nn.ModuleList)
        ]
        found[name] = inside[-1] if inside else ""
    return found
