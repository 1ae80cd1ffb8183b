"""Observers of a network that runs: where they hook, and what they add up over rows.

A layer is linear in its weight `[groups, out, in]` if each of its outputs is a product of that
weight with a row of its input: `nn.Linear`, transformers' `Conv1D`, and 1-D and 2-D convolutions,
whose rows are the patches under the kernel.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from gradmerge.engine.plan import Plan
from gradmerge.sources.collected import Statistic
from gradmerge.sources.skeleton import input_axis

# ---- hooks --------------------------------------------------------------------------------------

Hook = Callable[[nn.Module, Callable[[Tensor], Any]], RemovableHandle]


class Enough(Exception):  # noqa: N818 (it is no error)
    """Ends a pass once all watched layers have run."""


def before_call(module: nn.Module, see: Callable[[Tensor], object]) -> RemovableHandle:
    """Show a function what a module is called with."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        see(first_argument(args, kwargs))

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def after_call(module: nn.Module, see: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
    """Show a function what a module puts out; a tensor that it returns replaces the output."""
    return module.register_forward_hook(lambda _, __, output: see(output))


@contextmanager
def removing(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove hooks at the end of the context."""
    with ExitStack() as stack:
        for handle in handles:
            stack.enter_context(handle)
        yield


def first_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return what a layer is called with."""
    return args[0] if args else next(iter(kwargs.values()))


class Observer(ABC):
    """Adds up what modules see or put out while a network runs."""

    mask: Tensor | None = None
    """`[batch, tokens]` of the batch that runs, 0 on padding."""

    @abstractmethod
    def hooks(self) -> Iterator[RemovableHandle]:
        """Hook the modules, one after another."""

    def watching(self) -> AbstractContextManager[None]:
        """Observe the passes within the context, and their backward."""
        return removing(self.hooks())


# ---- rows and padding ---------------------------------------------------------------------------


def mask_of(skeleton: nn.Module, batch: Mapping[str, Any]) -> Tensor | None:
    """Return the mask of tokens; None for an encoder-decoder, whose decoder has other tokens."""
    decodes = getattr(getattr(skeleton, "config", None), "is_encoder_decoder", False)
    return None if decodes else batch.get("attention_mask")


def without_padding(values: Tensor, mask: Tensor | None, axis: int) -> Tensor:
    """Return values as `[rows, channels]`, without rows at tokens that are padding.

    The axes of batch and tokens are identified by their sizes, as

        [batch, tokens, ...], [batch, ..., tokens, ...], [tokens, batch, ...], [batch * tokens, ...]

    where the last is read as a `flatten` of the first two. If none fits, all rows are returned:
    pooled outputs, or those of another length (a convolution with a stride), hold no padding. So
    they are if several fit that keep different rows (as many heads as tokens, as many examples as
    tokens): rows of padding then count, but none is lost.

    Args:
        values: what a layer is given or puts out.
        mask: `[batch, tokens]`, 0 on padding.
        axis: the axis of channels.
    """
    values = values.movedim(axis, -1)
    sizes = values.shape[:-1]
    if mask is not None and mask.dim() == 2 and sizes:
        readings = [
            kept.reshape([n if i in axes else 1 for i, n in enumerate(sizes)]).expand(sizes)
            for axes, kept in _readings(sizes, mask != 0)
        ]
        if readings and all(kept.equal(readings[0]) for kept in readings):
            return values[readings[0]]
    return values.reshape(-1, values.shape[-1])


def _readings(sizes: Sequence[int], kept: Tensor) -> Iterator[tuple[list[int], Tensor]]:
    """Yield axes that may be batch and tokens (or both in one), and the rows kept along them."""
    batch, tokens = kept.shape
    if sizes[0] == batch:
        yield from (([0, i], kept) for i in range(1, len(sizes)) if sizes[i] == tokens)
    if list(sizes[:2]) == [tokens, batch]:
        yield [0, 1], kept.mT
    if sizes[0] == batch * tokens:
        yield [0], kept.flatten()


# ---- linear layers ------------------------------------------------------------------------------


@dataclass(frozen=True)
class LinearLayer:
    """A merged tensor that is used only as the weight of linear layers."""

    modules: Mapping[str, nn.Module]
    """The modules whose weight it is, by name (several if it is tied)."""
    axis: int
    """The tensor's axis of inputs: 1 for `[out, in, ...]`, 0 for `[in, out]`."""


def linear_layers(plan: Plan) -> dict[str, LinearLayer]:
    """Return the linear layers by the tensor's name, in the order of the plan.

    Left out are private tensors, and weights that anything else uses, too (an embedding tied to the
    output layer).
    """
    skeleton, binding = plan.skeleton, plan.binding
    assert skeleton is not None
    assert binding is not None
    found = {}
    for name in plan.tensors:
        parameters = binding.parameters.get(name, ())
        owners = [parameter.rpartition(".") for parameter in parameters]
        modules = {place: skeleton.get_submodule(place) for place, _, _ in owners}
        weights = all(attribute == "weight" for _, _, attribute in owners)
        if parameters and weights and all(map(is_linear, modules.values())):
            found[name] = LinearLayer(modules, input_axis(skeleton, parameters[0]))
    return found


_KINDS = ("torch.nn.modules.linear", "torch.nn.modules.conv", "transformers.pytorch_utils")


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is linear in its weight."""
    kind = type(module)
    of_transformers = kind.__module__ == _KINDS[-1] and kind.__name__ == "Conv1D"
    return of_transformers or isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d))


def is_plain(module: Any, args: Any, kwargs: Mapping[str, Any], output: Tensor) -> bool:
    """Return whether an output is what the layer's kind makes of its input, stored weight and bias,
    to a relative error of 5e-3 (convolutions on GPUs multiply with 10 bits), 0.03 in 16 bits.

    It is not under weight standardisation, or with a scale of the layer's own.
    """
    kind: Any = next(kind for kind in type(module).__mro__ if kind.__module__ in _KINDS)
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):  # `forward` calls a subclass's
        inputs = first_argument(args, kwargs)
        expected = kind._conv_forward(module, inputs, module.weight, module.bias)
    else:
        expected = kind.forward(module, *args, **kwargs)
    if expected.shape != output.shape:
        return False
    wide = expected.detach().float()
    apart = (output.detach().float() - wide).norm()
    return float(apart) <= (5e-3 if output.element_size() > 2 else 0.03) * float(wide.norm())


def input_rows(module: nn.Module, inputs: Tensor, mask: Tensor | None) -> Tensor:
    """Return the rows of inputs that a layer's weight is multiplied with, `[groups, rows, in]`."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return _patches(module, inputs)
    return without_padding(inputs, mask, -1)[None]


def output_rows(module: nn.Module, outputs: Tensor, mask: Tensor | None) -> Tensor:
    """Return the rows of outputs or their gradients, `[groups, rows, out]`, as `input_rows`."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        split = _batched(module, outputs).flatten(2).unflatten(1, (module.groups, -1))
        return split.permute(1, 0, 3, 2).flatten(1, 2)
    return without_padding(outputs, mask, -1)[None]


def _batched(module: nn.Conv1d | nn.Conv2d, values: Tensor) -> Tensor:
    """Add the axis of examples to a single example's inputs or outputs."""
    return values if values.dim() > 1 + len(module.kernel_size) else values[None]


def _patches(module: nn.Conv1d | nn.Conv2d, inputs: Tensor) -> Tensor:
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padding = module._reversed_padding_repeated_twice
    padded = functional.pad(_batched(module, inputs), padding, mode=mode)
    kernel, dilation, stride = module.kernel_size, module.dilation, module.stride
    if isinstance(module, nn.Conv1d):
        padded = padded.unsqueeze(2)
        kernel, dilation, stride = ((1, size[0]) for size in (kernel, dilation, stride))
    columns = functional.unfold(padded, kernel, dilation, 0, stride)
    split = columns.unflatten(1, (module.groups, -1))  # [batch, groups, in, positions]
    return split.permute(1, 0, 3, 2).flatten(1, 2)


# ---- Gram matrices ------------------------------------------------------------------------------


class Grams(Observer):
    """Sums over rows, `X^T X` of layers' inputs and optionally `D^T D` of their outputs' gradients.

    Without gradients, a layer that turns out not to be linear in its stored weight is left out,
    since its inputs tell nothing about that weight.
    """

    def __init__(self, layers: Mapping[str, LinearLayer], gradients: bool = False) -> None:
        self._layers, self._gradients = layers, gradients
        self._sums: dict[str, dict[str, Tensor]] = {name: {} for name in layers}
        self._rows: Counter[str] = Counter()
        self._plain: dict[str, bool] = {}

    @override
    def hooks(self) -> Iterator[RemovableHandle]:
        for name, layer in self._layers.items():
            for module in layer.modules.values():
                yield before_call(module, partial(self._add_input, name, module))
                if self._gradients:
                    yield after_call(module, partial(self._add_gradient, name, module))
                else:
                    hook = partial(self._verify, name)
                    yield module.register_forward_hook(hook, with_kwargs=True)

    @property
    def others(self) -> set[str]:
        """Tensors whose layer is not linear in them."""
        return {name for name, plain in self._plain.items() if not plain}

    def statistics(self, examples: int) -> dict[str, Statistic]:
        """Return the sums by tensor, those of gradients divided by the number of examples."""
        found = {}
        for name, sums in self._sums.items():
            if len(sums) == 1 + self._gradients and name not in self.others:
                values = {k: v / max(1, examples) if k == "output" else v for k, v in sums.items()}
                found[name] = Statistic(values, self._rows[name], self._layers[name].axis, 0.0)
        return found

    def _add_input(self, name: str, module: nn.Module, inputs: Tensor) -> None:
        if name not in self.others:
            rows = input_rows(module, inputs.detach(), self.mask)
            self._add(name, "input" if self._gradients else "gram", rows)
            self._rows[name] += rows.shape[1]

    def _verify(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        """Check once whether the layer's output is `x W^T + b`."""
        if name not in self._plain and output.numel():
            self._plain[name] = is_plain(module, args, kwargs, output)

    def _add_gradient(self, name: str, module: nn.Module, output: Tensor) -> Tensor:
        mask = self.mask
        if not output.requires_grad:  # the graph begins here, since no weight asks for a gradient
            output = output.detach().requires_grad_().clone()
        output.register_hook(
            lambda grad: self._add(name, "output", output_rows(module, grad, mask))
        )
        return output

    def _add(self, name: str, part: str, rows: Tensor) -> None:
        sums, product = self._sums[name], rows.mT @ rows
        sums[part] = sums[part].add_(product) if part in sums else product
