"""Merges over tokenizers that differ, row by row and token by token as mergekit makes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gradmerge import Recipe
from gradmerge.coefficients import Constant, Model
from gradmerge.engine.opening import open_plan
from gradmerge.engine.state import FitState
from gradmerge.export.folder import export_state
from gradmerge.sources import HuggingFace, Vocabulary
from wordings import bpe_family, rows_by_token, vocabulary_of

pytest.importorskip("mergekit", reason="mergekit is the oracle (pip install gradmerge[parity])")

TOLERANCE = 1e-6
WEIGHTS = {"a": 0.3, "b": 0.7}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def oracle(paths: dict[str, str], method: str, tokenizer: dict[str, Any], out: Path) -> Path:
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    LoaderCache().loaders.clear()
    settings: dict[str, Any] = {
        "merge_method": method,
        "dtype": "float32",
        "models": [
            {"model": paths[name], "parameters": {"weight": weight}}
            for name, weight in WEIGHTS.items()
        ],
        "parameters": {"normalize": False},
        "tokenizer": tokenizer,
    }
    if method == "task_arithmetic":
        settings["base_model"] = paths["base"]
        settings["parameters"]["lambda"] = 1.0
    options = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False, random_seed=0)
    run_merge(MergeConfiguration.model_validate(settings), str(out), options)
    return out


def ours(paths: dict[str, str], method: str, vocabulary: Vocabulary, out: Path) -> Path:
    recipe = Recipe(
        sources={name: paths[name] for name in WEIGHTS},
        base=paths["base"] if method == "task_arithmetic" else None,
        origin="base" if method == "task_arithmetic" else "zero",
        coefficients=Model(),
        init=Constant(list(WEIGHTS.values())),
        tokenizer=vocabulary,
    )
    plan = open_plan(recipe, with_skeleton=False)
    return export_state(FitState.start(plan), out)


# Without `base_model` mergekit takes the tokenizer of "base" from one model or another.
CASES = [("linear", s) for s in ("union", "a", "b")]
CASES += [("task_arithmetic", s) for s in ("union", "base", "b")]


@pytest.mark.parametrize(("method", "source"), CASES)
@pytest.mark.parametrize(("multiple", "padding"), [(None, 3), (16, 0)])
def test_rows_of_every_token_are_those_of_mergekit(
    tmp_path: Path, method: str, source: str, multiple: int | None, padding: int
) -> None:
    paths = bpe_family(tmp_path, padding)
    named = source if source in ("union", "base") else paths[source]
    options = {} if multiple is None else {"pad_to_multiple_of": multiple}
    expected = oracle(paths, method, {"source": named, **options}, tmp_path / "theirs")
    came = ours(paths, method, Vocabulary(source, multiple), tmp_path / "ours")

    assert vocabulary_of(came).keys() == vocabulary_of(expected).keys()
    for name in (EMBEDDING, HEAD):
        first, second = rows_by_token(expected, name), rows_by_token(came, name)
        for token, row in first.items():
            torch.testing.assert_close(
                second[token], row, rtol=0, atol=TOLERANCE, msg=lambda m, t=token: f"{t!r}: {m}"
            )
    theirs, mine = (HuggingFace(str(folder)).open() for folder in (expected, came))
    assert mine.infos[HEAD].shape == theirs.infos[HEAD].shape
    assert mine.config is not None
    assert mine.config["vocab_size"] == mine.infos[HEAD].shape[0]
    for name in theirs.infos:
        if name not in (EMBEDDING, HEAD):
            torch.testing.assert_close(mine.read(name), theirs.read(name), rtol=0, atol=TOLERANCE)
    if multiple is not None:
        used = len(vocabulary_of(came))
        assert used < mine.infos[HEAD].shape[0]
        torch.testing.assert_close(
            mine.read(HEAD)[used:], theirs.read(HEAD)[used:], rtol=0, atol=TOLERANCE
        )


def test_tied_embeddings_are_those_of_mergekit(tmp_path: Path) -> None:
    paths = bpe_family(tmp_path, tied=True)
    expected = oracle(paths, "task_arithmetic", {"source": "union"}, tmp_path / "theirs")
    came = ours(paths, "task_arithmetic", Vocabulary(), tmp_path / "ours")
    assert HEAD not in HuggingFace(str(came)).open().infos
    first, second = rows_by_token(expected, EMBEDDING), rows_by_token(came, EMBEDDING)
    assert first.keys() == second.keys()
    for token, row in first.items():
        torch.testing.assert_close(second[token], row, rtol=0, atol=TOLERANCE)
