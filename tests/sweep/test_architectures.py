"""Every family of transformers is merged and learned as it should be, or refused by name.

Each run tries a share that has every kind of conversion; `pytest -m nightly tests/sweep` tries all.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

import pytest
import transformers

sys.path.insert(0, str(Path(__file__).parent))

from sweep_architectures import PAGE, Row, all_families, measure, page

SHARE = {
    "Qwen3MoeForCausalLM": "CAUSAL_LM",  # experts stacked, gates and inputs joined
    "DeepseekV3ForCausalLM": "CAUSAL_LM",
    "OlmoHybridForCausalLM": "CAUSAL_LM",  # convolutions joined
    "HrmTextForCausalLM": "CAUSAL_LM",  # chunks
    "NomicBertForMaskedLM": "MASKED_LM",
    "Qwen3VLMoeForConditionalGeneration": "IMAGE_TEXT_TO_TEXT",  # transposed experts
    "InklingForConditionalGeneration": "IMAGE_TEXT_TO_TEXT",  # interleaved rows
    "Kimi_K25ForConditionalGeneration": "IMAGE_TEXT_TO_TEXT",  # rows in the order of rotations
    "Ernie4_5_VLMoeForConditionalGeneration": "IMAGE_TEXT_TO_TEXT",  # many tensors to many
    "Qwen3NextForCausalLM": "CAUSAL_LM",
    "ResNetForImageClassification": "IMAGE_CLASSIFICATION",
    "T5ForConditionalGeneration": "SEQ_TO_SEQ_CAUSAL_LM",
}


@pytest.mark.parametrize("name", SHARE)
def test_a_share_of_the_families_is_right(name, tmp_path):
    row = measure(name, SHARE[name], tmp_path)
    assert isinstance(row, Row), row
    assert row.right, row
    assert not row.refused
    assert re.search(rf"^\| `{name}`( \*)? \|", PAGE.read_text(), re.MULTILINE)


@pytest.mark.nightly
def test_every_family_is_right_or_refused_by_name(tmp_path):
    rows = [measure(name, kind, tmp_path / name) for name, kind in all_families()]
    tried = [row for row in rows if isinstance(row, Row)]
    assert not [row for row in tried if not row.right]
    assert len(tried) >= 400
    assert sum(bool(row.fused or row.split) for row in tried) >= 60


def test_every_class_is_on_the_page_with_its_numbers_or_a_reason():
    text = PAGE.read_text()
    version = re.search(r"transformers ([\d.]+);", text).group(1)
    if version != transformers.__version__:
        pytest.skip(f"the page is of transformers {version}")
    table, left = text.split("## Left out")
    tried, untried = (re.findall(r"^\| `(\w+)`", part, re.MULTILINE) for part in (table, left))
    assert sorted(tried + untried) == sorted(name for name, _ in all_families())
    reasons = re.findall(r"^\| `\w+` \| (\S.*) \|$", left, re.MULTILINE)
    assert len(reasons) == len(untried)
    assert f"\n{len(tried)} model classes" in text
    assert f"\n{len(untried)} classes were not tried" in left


def test_reasons_are_written_as_a_row():
    text = page([Row("A")], {"B": "does not build: ValueError: a|b <c>"})
    assert text.endswith("| `B` | does not build: ValueError: a\\|b &lt;c&gt; |\n")
    assert "1 classes were not tried" in text


def test_a_row_that_is_wrong_does_not_pass():
    good = Row("A")
    assert good.right
    assert Row("A", refused="A: cannot").right
    wrong = [
        dataclasses.replace(good, **change)
        for change in ({"gradient": 2e-9}, {"export": 2e-9}, {"low": False}, {"refused": "no"})
    ]
    assert not any(row.right for row in wrong)
