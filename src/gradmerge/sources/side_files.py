"""The files of a model folder beside its weights, and the one rule of what becomes of them.

A model needs its config, tokenizer, processors and chat templates, and its license goes with it;
a training run has left logs, arguments and states. The rule, which downloads, fingerprints and
exports share:

- a file of one of the kinds in `TRAVELS` belongs to the model, unless
- its name is one of `STAYS`: about the weights (which are written anew) or about their training;
- modelling code (`*.py`) belongs to it where a config names code (`auto_map`);
- of folders, only `additional_chat_templates` belongs to it, and the modules around a network
  (`gradmerge.sources.modules`).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from gradmerge.common.files import read_json
from gradmerge.sources.identity import require_files

CODE = "*.py"
"""Modelling code: downloaded and copied, but never run unless the recipe trusts it."""
TEMPLATES = "additional_chat_templates"
_LATER_KINDS = ("*.spm", "*.tiktoken", "*.bpe", "*.vocab")
LICENSES = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*")
TRAVELS = ("*.json", "*.txt", "*.model", "*.jinja", CODE, *_LATER_KINDS, *LICENSES)
DOWNLOADED = (*TRAVELS, "README.md", f"{TEMPLATES}/*", "[0-9]_*/*")
"""What is downloaded of a model on the hub besides its weights: the model card, too, for its
license, and the folders of sentence-transformers."""

# Written anew by every export, or about these weights alone.
_OF_WEIGHTS = ("*.index.json", "adapter_config.json", "emr.json", "provenance.json", "tokens.json")
OF_TRAINING = (
    *("args.json", "*_args.json", "train*.json", "hyperparameters*.json", "*_state.json"),
    *("log.json", "logs.json", "log_history.json", "*_log.json", "*_logs.json"),
    *("results*.json", "*_results.json", "eval*.json", "metrics*.json", "all_results*"),
    *("log*.txt", "*_log.txt", "train*.txt", "*_results.txt", "requirements*.txt"),
    "zero_to_fp32.py",
)
STAYS = (*_OF_WEIGHTS, *OF_TRAINING)
# Coefficients do not depend on them.
_UNRELATED = ("generation_config.json", *LICENSES)
_CONFIGS = (
    "config.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(Path(name).match(pattern) for pattern in patterns)


def belonging(folder: Path, ignored: Sequence[str] = ()) -> list[Path]:
    """Return the files in a folder that belong to its model by the rule, without its weights.

    Args:
        folder: the model's folder.
        ignored: patterns of further names to leave out.
    """
    found = [
        file
        for file in sorted(folder.iterdir())
        if _matches(file.name, TRAVELS) and not _matches(file.name, [*STAYS, *ignored])
    ]
    if any(file.match(CODE) for file in found):
        code = any("auto_map" in (read_json(folder / name) or {}) for name in _CONFIGS)
        found = [file for file in found if code or not file.match(CODE)]
    return found


def side_files(folder: Path) -> list[Path]:
    """Return what learned coefficients depend on: config, tokenizer, adapter settings, code.

    Raises:
        SourceError: something else has the name of one.
    """
    adapter = folder / "adapter_config.json"
    found = [*belonging(folder), *([adapter] if adapter.exists() else [])]
    require_files(found)
    return sorted(file for file in found if not _matches(file.name, _UNRELATED))


def is_compared(name: str, was_known: bool) -> bool:
    """Return whether a file that `side_files` names, or named, is compared with an earlier record.

    Args:
        name: its name, as `hashes_of` gives it.
        was_known: the record has it. Earlier versions recorded files of training runs, and no
            tokenizers of some kinds.
    """
    own = name.rpartition(":")[2]
    if own != "adapter_config.json" and _matches(own, STAYS):
        return False
    return was_known or not _matches(own, _LATER_KINDS)


def copy_files(
    source: Path, target: Path, patterns: Sequence[str] | None = None, ignored: Sequence[str] = ()
) -> None:
    """Copy what belongs to the model of a folder.

    Args:
        source: the folder.
        target: an existing folder.
        patterns: copy all files that match one of these instead.
        ignored: patterns of names to leave out.
    """
    if patterns is None:
        files = belonging(source, ignored)
        templates = sorted((source / TEMPLATES).glob("*.jinja"))
    else:
        files = [file for file in source.iterdir() if _matches(file.name, patterns)]
        files = [file for file in files if not _matches(file.name, ignored)]
        asked = _matches("chat_template.jinja", patterns)
        templates = sorted((source / TEMPLATES).glob("*.jinja")) if asked else []
    for file in files:
        if file.is_file():
            shutil.copyfile(file, target / file.name)
    for file in templates:
        (target / TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(file, target / TEMPLATES / file.name)
