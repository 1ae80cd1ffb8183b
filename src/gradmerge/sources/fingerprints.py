"""Are these the weights that coefficients were trained on?"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch

from gradmerge.errors import FingerprintError, shorten
from gradmerge.sources.base import Checkpoint


def fingerprints_of(checkpoints: Mapping[str, Checkpoint]) -> dict[str, str]:
    """Content hash of each checkpoint; reads all weights once, several checkpoints at a time."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # hashing lets go of the lock
        hashes = pool.map(lambda checkpoint: checkpoint.fingerprint(), checkpoints.values())
        return dict(zip(checkpoints, hashes, strict=True))


def require_same(expected: Mapping[str, str], came: Mapping[str, str]) -> None:
    """Refuse coefficients that were trained on other weights.

    Raises:
        FingerprintError: names and hashes of the sources that differ.
    """
    wrong = [name for name in expected if came.get(name) != expected[name]]
    wrong += [name for name in came if name not in expected]
    if wrong:
        raise FingerprintError(
            f"the coefficients were trained on other weights of: {shorten(wrong)}. "
            + "; ".join(
                f"{n}: expected {expected.get(n, 'none')[:12]}, came {came.get(n, 'none')[:12]}"
                for n in wrong[:5]
            )
            + ". Give the sources they were trained on, or train again."
        )
