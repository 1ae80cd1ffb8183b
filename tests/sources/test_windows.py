"""Windows of one tensor on another, followed through the operations that loaders use."""

from __future__ import annotations

import pytest
import torch

from gradmerge.sources.windows import Traced, Window

MOVES = {
    "chunks of rows": ((6, 4), lambda x: x.chunk(2, dim=0)),
    "chunks of columns": ((4, 6, 5), lambda x: [c.contiguous() for c in x.chunk(2, dim=1)]),
    "experts": ((4, 6, 5), lambda x: [c.squeeze(0) for c in torch.chunk(x, 4, dim=0)]),
    "unbound": ((3, 2, 4), lambda x: x.unbind(1)),
    "transposed": ((4, 6, 5), lambda x: x.transpose(1, 2).contiguous()),
    "permuted": ((4, 6, 5), lambda x: x.permute(2, 0, 1).contiguous()),
    "interleaved": ((6, 4), lambda x: x.reshape(3, 2, 4).transpose(0, 1).reshape(6, 4)),
    "interleaved halves": (
        (2, 6, 4),
        lambda x: x.reshape(2, 3, 2, 4).transpose(1, 2).reshape(2, 6, 4).chunk(2, dim=1),
    ),
    "rotary halves": ((12, 5), lambda x: x.view(2, 3, 2, 5).transpose(1, 2).reshape(12, 5)),
    "flattened": ((4, 3, 2, 2, 2), lambda x: x.reshape(4, -1)),
    "unequal splits": ((7, 2), lambda x: torch.split(x, [4, 1, 2])),
    "a column": ((3, 4), lambda x: x[:, 1]),
    "a new axis": ((3, 4), lambda x: x.unsqueeze(1).transpose(0, 1)),
}


@pytest.mark.parametrize("name", MOVES)
def test_a_window_is_what_the_operation_returns(name):
    shape, move = MOVES[name]
    whole = torch.arange(torch.Size(shape).numel()).view(shape) + 1
    found, expected = move(Traced(Window.over("whole", shape))), move(whole)
    pairs = [(found, expected)] if isinstance(expected, torch.Tensor) else zip(found, expected)  # noqa: B905
    for traced, part in pairs:
        window = traced.window
        assert window.shape == tuple(part.shape)
        assert torch.equal(window.of(whole), part)
        copy = torch.zeros_like(whole)
        window.write(copy, lambda out, part=part: out.copy_(part))
        assert torch.equal(copy, torch.where(torch.isin(whole, part.reshape(-1)), whole, 0))
        back = window.inverse("part", shape)
        if part.numel() < whole.numel():
            assert back is None
        else:
            assert torch.equal(back.of(part.contiguous()), whole)


def test_gradients_pass_a_window():
    whole = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    window = Traced(Window.over("w", (4, 6))).transpose(0, 1).chunk(2, dim=0)[1].window
    assert torch.autograd.gradcheck(window.of, whole)


def test_axes_are_found_again():
    experts = Traced(Window.over("w", (4, 6, 5)))
    one = experts.chunk(2, dim=1)[1].unbind(0)[2].window
    assert [one.axis_of((4, 6, 5), axis) for axis in range(3)] == [None, 0, 1]
    turned = experts.transpose(1, 2).window
    assert [turned.axis_of((4, 6, 5), axis) for axis in range(3)] == [0, 2, 1]


@pytest.mark.parametrize("work", [lambda x: x + 1, lambda x: torch.cat([x, x]), torch.abs])
def test_other_operations_are_refused(work):
    with pytest.raises(ValueError, match="moves more than the entries of one tensor"):
        work(Traced(Window.over("w", (2, 3))))


def test_entries_that_are_not_on_axes_are_refused():
    turned = Traced(Window.over("w", (4, 6))).transpose(0, 1).reshape(24)
    with pytest.raises(ValueError, match="entries 2 to 7"):
        turned[2:7]
