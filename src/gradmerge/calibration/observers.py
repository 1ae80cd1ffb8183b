"""Observers of a network that runs: where they hook, and what they add up over rows.

A layer is linear in its weight `[groups, out, in]` if each of its outputs is a product of that
weight with a row of its input: `nn.Linear`, transformers' `Conv1D`, and 1-D and 2-D convolutions,
whose rows are the patches under the kernel.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from gradmerge.engine.plan import Plan
from gradmerge.sources.collected import Statistic
from gradmerge.sources.skeleton import input_axis

# ---- observers ----------------------------------------------------------------------------------


class Enough(Exception):  # noqa: N818 (it is no error)
    """Ends a pass once all watched layers have run."""


class Observer:
    """Sees what modules are called with and put out while a network runs."""

    watched: Sequence[tuple[Any, nn.Module]]
    """The modules, and what each is known by."""
    mask: Tensor | None = None
    """`[batch, tokens]` of the batch that runs, 0 on padding."""

    def before(self, key: Any, module: nn.Module, inputs: Tensor) -> None:
        """See what a module is called with."""

    def after(
        self, key: Any, module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any
    ) -> Tensor | None:
        """See what a module puts out; a tensor that is returned replaces it."""
        return None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Observe the passes within the context, and their backward."""

        def before(key: Any, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
            self.before(key, module, first_argument(args, kwargs))

        with ExitStack() as hooks:
            for key, module in self.watched:
                first, then = partial(before, key), partial(self.after, key)
                hooks.enter_context(module.register_forward_pre_hook(first, with_kwargs=True))
                hooks.enter_context(module.register_forward_hook(then, with_kwargs=True))
            yield


def first_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return what a layer is called with."""
    return args[0] if args else next(iter(kwargs.values()))


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
        return _by_group(_batched(module, outputs).flatten(2), module.groups)
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
    return _by_group(functional.unfold(padded, kernel, dilation, 0, stride), module.groups)


def _by_group(columns: Tensor, groups: int) -> Tensor:
    """Return `[batch, groups * channels, positions]` as `[groups, rows, channels]`."""
    return columns.unflatten(1, (groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)


# ---- Gram matrices ------------------------------------------------------------------------------


class Grams(Observer):
    """Sums over rows, `X^T X` of layers' inputs and optionally `D^T D` of their outputs' gradients.

    Without gradients, a layer that turns out not to be linear in its stored weight is left out,
    since its inputs tell nothing about that weight. A pass ends with the module `stop`.
    """

    def __init__(
        self,
        layers: Mapping[str, LinearLayer],
        gradients: bool = False,
        stop: nn.Module | None = None,
    ) -> None:
        self.watched = [(name, m) for name, la in layers.items() for m in la.modules.values()]
        self.watched += [] if stop is None else [("", stop)]
        self._layers, self._gradients = layers, gradients
        self._sums: dict[str, dict[str, Tensor]] = {name: {} for name in layers}
        self._rows: Counter[str] = Counter()
        self._plain: dict[str, bool] = {}

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

    @override
    def before(self, key: str, module: nn.Module, inputs: Tensor) -> None:
        if key and key not in self.others:
            rows = input_rows(module, inputs.detach(), self.mask)
            self._add(key, "input" if self._gradients else "gram", rows)
            self._rows[key] += rows.shape[1]

    @override
    def after(
        self, key: str, module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Tensor
    ) -> Tensor | None:
        if not key:
            raise Enough
        if self._gradients:
            return self._with_gradient(key, module, output)
        if key not in self._plain and output.numel():
            self._plain[key] = is_plain(module, args, kwargs, output)
        return None

    def _with_gradient(self, name: str, module: nn.Module, output: Tensor) -> Tensor:
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
