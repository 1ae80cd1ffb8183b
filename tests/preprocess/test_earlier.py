"""Directions times the coefficients of an earlier merge."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from gradmerge.common.errors import ConfigError
from gradmerge.preprocess import EarlierCoefficients, Site

GENERATOR = torch.Generator().manual_seed(0)
DIRECTIONS = torch.randn(2, 3, 4, generator=GENERATOR)
STORED = {
    "w": ("element", torch.randn(2, 3, 4, generator=GENERATOR)),
    "columns": ("axis 1", torch.randn(2, 4, generator=GENERATOR)),
    "rows": ("axis 0", torch.randn(2, 3, generator=GENERATOR)),
    "tensor": ("scalar", torch.randn(2, generator=GENERATOR)),
    "frozen": (None, torch.tensor([0.0, 0.0])),
    "parts": ("partition of seed 0", torch.randn(2, 5, generator=GENERATOR)),
    "runs": ("axis 0 in runs", torch.randn(2, 2, generator=GENERATOR)),
    "small": ("element", torch.randn(2, 3, 2, generator=GENERATOR)),
}


@pytest.fixture
def folder(tmp_path):
    slots = {name: spread for name, (spread, _) in STORED.items() if spread}
    metadata = {"sources": json.dumps(["b", "a"]), "slots": json.dumps(slots)}
    tensors = {name: values for name, (_, values) in STORED.items()}
    save_file(tensors, tmp_path / "coefficients.st", metadata)
    return str(tmp_path)


@pytest.mark.parametrize("name", ["w", "columns", "rows", "tensor", "frozen"])
def test_each_direction_is_multiplied_by_its_own(folder, name):
    stored = STORED[name][1].numpy()[::-1]  # in the order of the sources here
    place = {"w": "kij,kij->kij", "columns": "kj,kij->kij", "rows": "ki,kij->kij"}
    formula = torch.as_tensor(stored.copy())
    expected = torch.einsum(place.get(name, "k,kij->kij"), formula, DIRECTIONS)
    got = EarlierCoefficients(folder)(DIRECTIONS.clone(), Site(name, ("a", "b")))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("parts", "of parts per tensor, row, column or weight, got partition"),
        ("runs", "got axis 0 in runs of shape"),
        ("small", r"of shape \[3, 4\], got \[3, 2\]. The earlier merge was of another network"),
        ("other", "EarlierCoefficients: .* contains no coefficients for other"),
    ],
)
def test_what_cannot_be_continued_is_refused(folder, name, message):
    with pytest.raises(ConfigError, match=message):
        EarlierCoefficients(folder)(DIRECTIONS.clone(), Site(name, ("a", "b")))
