"""Rows of padding, identified by the sizes of outputs; plain and other layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gradmerge.calibration.observers import is_plain, without_padding


def mask_of(batch: int, tokens: int) -> torch.Tensor:
    """The last token of the first example is padding."""
    mask = torch.ones(batch, tokens)
    mask[0, -1] = 0
    return mask


def marked(shape: tuple[int, ...], padding: tuple[int | slice, ...]) -> torch.Tensor:
    """Ones, and zeros on padding."""
    values = torch.ones(shape)
    values[padding] = 0
    return values


@pytest.mark.parametrize(
    ("shape", "padding", "tokens"),
    [
        ((2, 4, 5), (0, 3), 4),
        ((2, 4, 3, 5), (0, 3), 4),
        ((2, 3, 4, 5), (0, slice(None), 3), 4),
        ((4, 2, 5), (3, 0), 4),
        ((4, 2, 3, 5), (3, 0), 4),
        ((8, 5), (3,), 4),
    ],
    ids=["plain", "heads behind", "heads before", "tokens first", "and heads", "flattened"],
)
def test_rows_of_padding_are_found_by_their_sizes(
    shape: tuple[int, ...], padding: tuple[int | slice, ...], tokens: int
) -> None:
    values = marked(shape, padding)
    kept = without_padding(values, mask_of(2, tokens), -1)
    assert (kept == 1).all()
    assert kept.numel() == values.sum()


@pytest.mark.parametrize(
    ("shape", "batch", "tokens"),
    [((2, 4, 4, 5), 2, 4), ((4, 4, 5), 4, 4), ((4, 4, 3, 5), 4, 4), ((2, 2, 4, 4, 5), 2, 4)],
    ids=["heads like tokens", "examples like tokens", "and heads", "pictures of heads"],
)
def test_where_two_layouts_fit_no_row_is_lost(
    shape: tuple[int, ...], batch: int, tokens: int
) -> None:
    values = torch.randn(shape)
    kept = without_padding(values, mask_of(batch, tokens), -1)
    assert torch.equal(kept, values.flatten(0, -2))
    whole = without_padding(values, torch.ones(batch, tokens), -1)
    assert whole.sum().item() == pytest.approx(values.sum().item(), abs=1e-4)


def test_layouts_that_leave_out_the_same_rows_are_no_question() -> None:
    """A mask that is symmetric, batch first or tokens first."""
    mask = torch.tensor([[1, 1], [1, 0]])
    kept = without_padding(marked((2, 2, 5), (1, 1)), mask, -1)
    assert kept.shape == (3, 5)
    assert (kept == 1).all()


def ten_bits(values: torch.Tensor) -> torch.Tensor:
    """Rounded as TF32 has it: 10 bits behind the leading one."""
    return ((values.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(16, 8, 3, padding=1, bias=False), (2, 16, 9, 9)),
        (nn.Conv1d(32, 8, 3, groups=2, bias=False), (2, 32, 20)),
        (nn.Conv3d(8, 8, 3, bias=False), (2, 8, 5, 5, 5)),
        (nn.ConvTranspose2d(16, 8, 3, bias=False), (2, 16, 9, 9)),
        (nn.Linear(64, 8, bias=False), (2, 64)),
    ],
    ids=["2d", "1d", "3d", "transposed", "linear"],
)
@torch.no_grad()
def test_products_with_ten_bits_are_plain_and_a_transformed_weight_is_not(
    layer: nn.Module, shape: tuple[int, ...]
) -> None:
    """Inputs with a mean six times their deviation, which the weights cancel."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator) + 6
    weight: torch.Tensor = layer.weight  # type: ignore[assignment]
    drawn = torch.randn(weight.shape, generator=generator) / 10
    reads = [0, 2, 3] if isinstance(layer, nn.ConvTranspose2d) else list(range(1, weight.dim()))
    stored = drawn - drawn.mean(dim=reads, keepdim=True)
    outputs = []
    for used in (ten_bits(stored), stored * 1.01):
        weight.copy_(used)
        outputs.append(layer(ten_bits(x)))
    weight.copy_(stored)
    got = [is_plain(layer, (x,), {}, output) for output in outputs]
    assert got == [True, False]


class Tokens(nn.Conv2d):
    """Patches as tokens: the output has other axes than a convolution's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).flatten(2).mT


class Cropped(nn.ConvTranspose2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x)[..., 1:-1, 1:-1]


class Halved(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)[:, :3]


@pytest.mark.parametrize("kind", [Tokens, Cropped, Halved])
@pytest.mark.parametrize("groups", [1, 2])
@torch.no_grad()
def test_an_output_of_another_shape_is_not_plain(kind: type[nn.Conv2d], groups: int) -> None:
    layer, x = kind(4, 6, 3, groups=groups), torch.randn(2, 4, 6, 6)
    assert not is_plain(layer, (x,), {}, layer(x))
