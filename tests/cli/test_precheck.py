"""Mistakes found before anything heavy is imported, and other spellings of the same options."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from commands import fails
from gradmerge.cli import main
from gradmerge.cli.precheck import prechecked
from gradmerge.common.errors import ConfigError
from tiny import write_yaml as write

pytestmark = pytest.mark.usefixtures("own_folder")
ROOT = Path(__file__).parents[2]


def changed(world, *settings, removed=()):
    """The configuration with some options set, by dotted name."""
    found = copy.deepcopy(world)
    for path, value in [*settings, *((path, None) for path in removed)]:
        *groups, name = path.split(".")
        inner = found
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[name] = value
        if path in removed:
            del inner[name]
    return found


def driver(name, **options):
    return {"class_path": name, "init_args": options}


KEEP = driver("lightning.pytorch.callbacks.ModelCheckpoint", save_top_k=-3)
TRIM = {"class_path": "Trim", "init_args": {"density": 1.5}}
# Option, value, and the words of the message; those of the first list need no torch.
FORM = [
    ("data.tasks.a.kind", "text_clasification", "a.kind: expected one of .*'text_clasification'"),
    ("data.tasks.a.max_lenght", 8, r"Did you mean 'data\.tasks\.a\.max_length'"),
    ("data.batch_size", "eight", r"data\.batch_size: expected a whole number, got 'eight'"),
    ("data.tasks.a.data_files", "absent.json", r"a\.data_files: .*absent\.json does not exist"),
    ("data.tasks", ["a"], "tasks: expected a mapping from names to TaskData"),
    ("model.recipe.coefficients", "Softmx", "expected one of .*Did you mean 'Softmax'"),
    ("model.recipe.init", "Tensor", r"Constant, .*got 'Tensor', which is of gradmerge\.coeff"),
    ("model.recipe.init", {"class_path": "Constant", "value": 1}, r"init_args: \{value: \.\.\.\}"),
    ("model.recipe.source", {}, r"Did you mean 'model\.recipe\.sources'"),
    ("model.recipe.tokenizer", "union", "tokenizer: expected a mapping with source, pad_to"),
    ("data.tasks.a.source", "bb", r"tasks\.a\.source: unknown source 'bb' \(choose from a, b\)"),
    ("tasks", {}, r"tasks: no such option.* Did you mean 'data\.tasks'"),
    ("optimizer", {"class_path": "AdamW", "init_args": {"learning_rate": 1}}, "Choose from lr, "),
    ("trainer.max_stps", 3, r"Did you mean 'trainer\.max_steps'"),
    ("trainer.max_steps", -5, r"trainer\.max_steps: expected a number of at least -1, got -5"),
    ("trainer.num_nodes", "two", r"trainer\.num_nodes: expected a whole number"),
    ("model.recipe.statistics", "absent", r"statistics: .*absent does not exist"),
    ("model.recipe.sources", {"a": "x/a", "b": "y/b/c"}, r"sources\.b: y/b/c: expected a folder"),
    (
        "driver",
        driver("LayerWise", epochs=0),
        r"init_args\.epochs: .*at least 1, got 0",
    ),
    ("driver", driver("Tree", every_n_steps=0), r"driver\.init_args\.every_n_steps: .*got 0\."),
    ("driver", driver("Continual", earlier="x", alpha=1.5), r"alpha: .*from 0 to 1, got 1\.5"),
    (
        "driver",
        driver("Continual", earlier="no/x"),
        r"init_args\.earlier: expected a model folder",
    ),
    ("trainer.callbacks", [KEEP], r"callbacks\[0\]\.init_args\.save_top_k: .*at least -1, got -3"),
    ("trainer.limit_val_batches", 1.5, r"trainer\.limit_val_batches: .*a share of them.*got 1\.5"),
]
VALUES = [
    ("model.recipe.preprocess", [TRIM], r"preprocess\[0\]: Trim\.density: expected a share"),
    ("model.recipe.origin", "zero", None),
    ("data.tasks.a.fractions", [1, 2, 3], r"data\.tasks\.a: fractions: expected three positive"),
    ("data.batch_size", 0, r"data\.batch_size: expected 1 to"),
    ("model.learning_rate", -1, r"model\.learning_rate: expected at least 0"),
    ("optimizer", {"class_path": "SGD", "init_args": {"lr": -1}}, "Invalid learning rate"),
]


# Arguments of commands without a recipe, and the words of the message; none needs torch.
OTHERS = [
    ("export absent.ckpt out", r"absent\.ckpt: no such checkpoint"),
    ("export x.ckpt out --dtyp bf16", r"--dtyp: no such option\. Did you mean '--dtype'\?"),
    ("export x.ckpt out --dtype bf61", r"--dtype: expected one of float64, .*got 'bf61'\. Did you"),
    ("export x.ckpt there --dtype bf16", r"there exists; give another folder, or --overwrite"),
    ("export x.ckpt", r"output: required, but not given \(folder to write\)"),
    ("export x.ckpt out more", r"expected CHECKPOINT and OUTPUT, got also 'more'"),
    ("export x.ckpt out --sources a=no/a/a b=no/b/b", r"2 mistakes:\n.*\.a: no/.*\n.*\.b: no/"),
    ("unpack absent out --dtype int3", r"--dtype: expected one of .*, got 'int3'"),
    ("unpack there2 out", r"there2: expected an exported folder, .* Did you mean there\?"),
    ("inspect no/a/x no/b/y --base no/c/z", r"3 mistakes:\n  base: no/c.*\n.*\[0\].*\n.*\[1\]"),
    (
        "inspect there there --statistics maybe",
        r"--statistics: expected true or false, got",
    ),
    ("push absent owner/name --dry-run true", r"absent: expected an exported folder"),
    ("push there name", r"repo: expected owner/name, got 'name'"),
    ("push there owner/name --privat false", r"Did you mean '--private'\?"),
    ("evaluate no/model/x --tasks piqa", r"no/model/x: expected a folder or file"),
    ("evaluate there --tasks piqa --limit 0", r"limit: expected a number of at least 1, got 0"),
    ("evaluate there --tasks piqa --head a", r"expected a checkpoint for `head` and `sources`"),
    ("evaluate there --tasks piqa --include_path away", r"include_path: expected a folder of task"),
    ("evaluate there --config x.yaml", r"--config: no such option"),
]


def test_mistakes_are_found_before_anything_heavy_is_imported(world, tmp_path):
    """All of them in one process, in which nothing that they import may be heavy."""
    Path("there").mkdir()
    Path("there/kept").touch()
    Path("x.ckpt").touch()
    cases = [[given.split(), message, True] for given, message in OTHERS]
    for i, (path, value, message) in enumerate([*FORM, *VALUES]):
        file = write(tmp_path / f"{i}.yaml", changed(world, (path, value)))
        if message is not None:
            cases.append([["fit", "--config", file], message, i < len(FORM)])
    script = tmp_path / "run.py"
    script.write_text(
        "import contextlib, io, json, re, sys\n"
        "from gradmerge.cli import main\n"
        "for given, message, is_form in json.loads(sys.argv[1]):\n"
        "    with contextlib.redirect_stderr(io.StringIO()) as printed:\n"
        "        try:\n"
        "            status = main(given)\n"
        "        except SystemExit as stopped:\n"
        "            status = stopped.code\n"
        "    text = printed.getvalue()\n"
        "    heavy = ('lightning', 'transformers', 'datasets', *(['torch'] if is_form else []))\n"
        "    loaded = [name for name in heavy if name in sys.modules]\n"
        "    if status != 2 or loaded or not re.search(message, text) or len(text) > 700:\n"
        "        print(message, status, loaded, text)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(cases)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_all_mistakes_are_listed_at_once(world, tmp_path, capsys):
    part = changed(
        world,
        ("model.recipe.sources", {"a": "no/a/b", "b": "no/b/c"}),
        ("model.recipe.base", "no/base/x"),
    )
    text = fails(["fit", "--config", write(tmp_path / "c.yaml", part)], capsys)
    assert text.startswith("gradmerge fit: 3 mistakes:\n  model.recipe.base: no/base/x: expected a")
    assert all(f"\n  model.recipe.sources.{name}: no/{name}/" in text for name in "ab")
    part = changed(world, ("data.tasks.a.kind", "x"), ("model.memory", "y"), ("trainer.z", 1))
    text = fails(["fit", "--config", write(tmp_path / "c.yaml", part)], capsys)
    assert text.startswith("gradmerge fit: 3 mistakes:\n")
    for name in ("data.tasks.a.kind", "model.memory", "trainer.z"):
        assert re.search(rf"^  .*c\.yaml: {re.escape(name)}: ", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.batch_size", "x"], "--data.batch_size: expected a whole number, got 'x'."),
        (["--data.tasks.a.knd=x"], "Did you mean '--data.tasks.a.kind'?"),
        (["--recipe.init", "Unifrm"], "--model.recipe.init: expected one of "),
        (["--recipe.init.valuee", "3"], "--model.recipe.init.valuee: no such option of Constant."),
        (["--recipe.preprocess+=Trm"], "Did you mean 'Trim'?"),
        (["--config", "absent.yaml"], "--config absent.yaml: expected a YAML file, got no such"),
    ],
)
def test_mistakes_in_options_are_explained(arguments, message, world, tmp_path, capsys):
    config = write(tmp_path / "c.yaml", changed(world, ("model.recipe.init", "Constant")))
    assert message in fails(["fit", "--config", config, *arguments], capsys)


def test_what_is_required_is_named(world, tmp_path, capsys):
    part = changed(world, removed=["model.recipe.sources", "data.tasks.a.path"])
    text = fails(["fit", "--config", write(tmp_path / "c.yaml", part)], capsys)
    assert "model.recipe.sources: required, but not given (Fine-tuned checkpoints by name" in text
    assert "data.tasks.a.path: required, but not given (" in text
    assert "output: required" in fails(["merge", "--recipe.sources", "{a: x, b: y}"], capsys)


# ---- what is not refused -------------------------------------------------------------------------


def test_every_shipped_configuration_passes(tmp_path, monkeypatch):
    """With the suite of language models, whose folders are made here."""
    monkeypatch.chdir(tmp_path)
    suite = ROOT / "configs/suites/lm.yaml"
    text = "".join(path.read_text() for path in (ROOT / "configs").rglob("*.yaml"))
    for place in set(re.findall(r"[\w.-]+(?:/[\w.-]+)+\.jsonl", text)):
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        Path(place).touch()
    for place in set(re.findall(r"[\w./-]*\.cache/[\w./-]*(?:base|experts/\w+)\b", text)):
        Path(place).mkdir(parents=True, exist_ok=True)
    for place in re.findall(r"(?:statistics|earlier): ([\w./-]+)", text):
        Path(place).mkdir(parents=True, exist_ok=True)
    checked = 0
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        folder = path.parent.name
        given = ["--config", str(suite), "--config", str(path)]
        if folder == "drivers":
            given[2:2] = ["--config", str(ROOT / "configs/methods/column.yaml")]
        if folder in ("methods", "drivers"):
            assert prechecked("fit", given) == given, path
            assert prechecked("validate", given) == given, path
        if folder in ("methods", "static"):
            given = [*given, "--output", "x"]
            assert prechecked("merge", given) == given, path
        checked += 1
    assert checked > 60


def test_the_configuration_that_a_fit_saves_passes(world, tmp_path):
    assert main(["fit", "--config", write(tmp_path / "c.yaml", world)]) == 0
    saved = [str(path) for path in tmp_path.rglob("config.yaml")]
    given = ["--config", saved[0]]
    assert len(saved) == 1
    assert prechecked("fit", given) == given


def test_classes_of_allowed_modules_are_for_the_parser(world, tmp_path):
    part = changed(world, ("model.recipe.init", "Mine"), ("model.recipe.operator", "own.Sum"))
    given = ["--config", write(tmp_path / "c.yaml", part)]
    with pytest.raises(ConfigError, match=r"recipe\.init: expected one of .*, got 'Mine'"):
        prechecked("fit", given)
    assert prechecked("fit", [*given, "--allow_modules=own"])[:2] == given


# ---- other spellings -----------------------------------------------------------------------------


def canonical(command, file, *options):
    """The content of a file, and the options, as the parser gets them."""
    found = prechecked(command, ["--config", str(file), *options])
    content = found[1] if "\n" in found[1] else Path(found[1]).read_text()
    return yaml.safe_load(content), found[2:]


@pytest.mark.parametrize(
    ("path", "given", "meant"),
    [
        ("model.dtype", "bf16", "bfloat16"),
        ("model.dtype", "fp16", "float16"),
        ("model.objective", "Entropy", {"terms": ["Entropy"]}),
        ("model.objective", ["Entropy", "CrossEntropy"], {"terms": ["Entropy", "CrossEntropy"]}),
        ("model.recipe.preprocess", "Trim", ["Trim"]),
        ("model.recipe.private", "head", ["head"]),
    ],
)
def test_other_forms_of_a_value_are_accepted(path, given, meant, world, tmp_path):
    file = write(tmp_path / "c.yaml", changed(world, (path, given)))
    found, _ = canonical("fit", file)
    assert found == changed(world, (path, meant))
    file = write(tmp_path / "c.yaml", world)
    flag = f"--{path}={given if isinstance(given, str) else json.dumps(given)}"
    _, options = canonical("fit", file, flag)
    name, _, value = options[0].partition("=")
    assert (name, yaml.safe_load(value)) == (f"--{path}", meant)


def test_a_list_of_sources_gets_names(world, tmp_path):
    places = list(world["model"]["recipe"]["sources"].values())
    twice = [*places, places[0]]
    file = write(tmp_path / "c.yaml", changed(world, ("model.recipe.sources", twice)))
    found, _ = canonical("fit", file)
    names = found["model"]["recipe"]["sources"]
    assert list(names) == ["a", "b", "a2"]
    assert list(names.values()) == twice


@pytest.mark.parametrize("top", [False, True])
@pytest.mark.parametrize("prefix", ["--recipe", "--model.recipe"])
def test_a_recipe_is_spelled_the_same_in_every_command(prefix, top, world, tmp_path):
    recipe = world["model"]["recipe"]
    world = {key: value for key, value in world.items() if key != "model"}
    own = {"recipe": recipe} if top else {"model": {"recipe": recipe}}
    file = write(tmp_path / "c.yaml", world, own)
    option = f"{prefix}.init.value=0.4"
    found, options = canonical("fit", file, option)
    assert found["model"]["recipe"] == recipe
    assert options == ["--model.recipe.init.value=0.4"]
    assert canonical("merge", file, option, "--output=x")[1] == [
        "--recipe.init.value=0.4",
        "--output=x",
    ]


def test_a_file_for_merge_learns_and_a_file_for_fit_merges(world, tmp_path, capsys):
    """With every other spelling at once, through the whole commands."""
    recipe = world["model"]["recipe"]
    given = {
        "recipe": {**recipe, "sources": list(recipe["sources"].values()), "preprocess": "Trim"},
        "output": "merged",
        "dtype": "bf16",
        "data": world["data"],
    }
    file = write(tmp_path / "merge.yaml", given)
    assert main(["merge", "--config", file, "--model.recipe.init.value", "0.4"]) == 0
    stored = json.loads(Path("merged/provenance.json").read_text())
    assert stored["recipe"]["init_args"]["init"]["init_args"]["value"] == 0.4
    assert json.loads(Path("merged/config.json").read_text())["dtype"] == "bfloat16"
    fit = {"trainer": {**world["trainer"], "max_steps": 1}}
    options = ["--config", write(tmp_path / "fit.yaml", fit), "--model.objective", "Entropy"]
    capsys.readouterr()
    assert main(["fit", "--config", file, *options, "--model.dtype=bf16"]) == 0
    text = capsys.readouterr().err
    assert "merge.yaml: dtype, output: only for `gradmerge merge`, not used here" in text
    assert "Tip:" not in text
