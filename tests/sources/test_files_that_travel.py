"""The rule of what travels from a source's folder to an export, and what stays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from gradmerge import Recipe, merge
from gradmerge.common.errors import FingerprintError
from gradmerge.sources import as_source
from gradmerge.sources.base import require_same_files, side_hashes
from gradmerge.sources.side_files import side_files
from tiny import relatives, save_family

MODEL = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "source.spm", "qwen.tiktoken",
    "vocab.bpe", "vocab.json", "merges.txt", "chat_template.jinja", "preprocessor_config.json",
    "generation_config.json", "LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md",
    "additional_chat_templates/rag.jinja",
)  # fmt: skip
TRAINING = (
    "args.json", "training_args.bin", "training_args.json", "eval_log.json", "trainer_state.json",
    "all_results.json", "train_results.json", "optimizer.pt", "scheduler.pt", "rng_state.pth",
    "trainer_log.jsonl", "train.log", "requirements.txt", "zero_to_fp32.py", "train.py", "latest",
    "model.safetensors.index.json.bak", "runs/events.out", "wandb/run.json",
    "checkpoint-10/config.json", "global_step10/mp_rank_00.pt", "README.md", "adapter_config.json",
)  # fmt: skip


def network():
    sizes = {"vocab_size": 32, "n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 16}
    config = transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)
    return transformers.GPT2LMHeadModel(config)


def write(folder, names, text="{}"):
    for name in names:
        path = Path(folder, name)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)


@pytest.fixture
def family(tmp_path):
    return save_family(tmp_path / "models", relatives(network()))


def files_in(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_gets_what_its_model_needs_and_nothing_of_a_training_run(family, tmp_path):
    write(family["base"], [*MODEL, *TRAINING])
    write(family["a"], ["of_another_source.json"])
    recipe = Recipe({"a": family["a"], "b": family["b"]}, family["base"])
    merged = merge(recipe, tmp_path / "merged")
    own = {
        "config.json", "model.safetensors", "coefficients.st", "provenance.json", "report.html",
        ".gradmerge", "README.md",
    }  # fmt: skip
    assert files_in(merged) == {*MODEL, *own}
    for name in set(MODEL) - own:
        assert (merged / name).read_bytes() == Path(family["base"], name).read_bytes()


def test_code_travels_where_a_config_names_it(family, tmp_path):
    """`auto_map` names modelling code; other scripts stay behind."""
    write(family["base"], ["modeling_own.py", "helper.py", "zero_to_fp32.py"], "x = 1\n")
    recipe = Recipe({"a": family["a"]}, family["base"])
    assert not [n for n in files_in(merge(recipe, tmp_path / "one")) if n.endswith(".py")]
    config = Path(family["base"], "tokenizer_config.json")
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({**settings, "auto_map": {"AutoTokenizer": ["helper.T", None]}}))
    names = {n for n in files_in(merge(recipe, tmp_path / "two")) if n.endswith(".py")}
    assert names == {"modeling_own.py", "helper.py"}


def test_coefficients_depend_on_the_model_alone(family):
    """Records of earlier versions have files of training runs, and lack some tokenizers."""
    before = [path.name for path in side_files(Path(family["a"]))]
    write(family["a"], [*TRAINING[:3], "LICENSE", "source.spm"])
    assert {p.name for p in side_files(Path(family["a"]))} == {*before, "source.spm"}
    now = {"a": side_hashes(as_source(family["a"]).open())}
    earlier = {"a": {**now["a"], "args.json": "0", "1:args.json": "0"}}
    del earlier["a"]["source.spm"]
    require_same_files("x", earlier, now)
    with pytest.raises(FingerprintError, match=r"a: source\.spm differ"):
        require_same_files("x", {"a": {**now["a"], "source.spm": "0"}}, now)
    with pytest.raises(FingerprintError, match=r"a: vocab\.json differ"):
        require_same_files("x", now, {"a": {**now["a"], "vocab.json": "0"}})
