"""Which rows are padding, by the sizes of what layers give."""

from __future__ import annotations

import pytest
import torch

from gradmerge.observation import without_padding


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
    kept, axis = without_padding(values, mask_of(2, tokens), -1)
    assert axis == -1
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
    kept, axis = without_padding(values, mask_of(batch, tokens), -1)
    assert kept is values
    assert axis == -1
    whole, _ = without_padding(values, torch.ones(batch, tokens), -1)
    assert whole.sum().item() == pytest.approx(values.sum().item(), abs=1e-4)


def test_layouts_that_leave_out_the_same_rows_are_no_question() -> None:
    """A mask that is symmetric, batch first or tokens first."""
    mask = torch.tensor([[1, 1], [1, 0]])
    kept, _ = without_padding(marked((2, 2, 5), (1, 1)), mask, -1)
    assert kept.shape == (3, 5)
    assert (kept == 1).all()
