"""Files that gradmerge itself wrote, damaged field by field: read, or refused by name."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gradmerge import MergedModel, Recipe
from gradmerge.alignment import PermutationSpec
from gradmerge.alignment.moments import CollectedActivations
from gradmerge.cli.score import _private_of
from gradmerge.coefficients import FromFile, InitContext, MergeTensor, Slot
from gradmerge.common import patterns
from gradmerge.common.errors import ConfigError, GradmergeError, SourceError
from gradmerge.common.schema import a_count, a_name, require_shape
from gradmerge.drivers import Continual
from gradmerge.drivers.state import STEP, StepRecord, read_json
from gradmerge.sources import EMR, Lora, SafetensorsFile, as_source
from gradmerge.sources.collected import SourceStatistics
from gradmerge.training.checkpoint import restore, to_save
from mutations import mutations
from tiny import build, relatives

FIXTURES = Path(__file__).parents[1] / "compat" / "fixtures"


def survivors(path, data, use, named=None):
    """Use every mutation of a file; return those that were read. The others are refused by name."""
    read, refused, unnamed = [], [], []
    for label, changed in mutations(data):
        path.write_text(json.dumps(changed))
        try:
            use()
        except GradmergeError as error:
            (refused if (named or path.name) in str(error) else unnamed).append(f"{label}: {error}")
        else:
            read.append(label)
    path.write_text(json.dumps(data))
    use()
    assert len(refused) > 20
    assert not unnamed
    assert max(map(len, refused)) < 1500
    return read


def fields_of(read):
    """Fields that survived other values than they had, without what is always accepted."""
    return {label.rpartition(":")[0] for label in read}


# ---- the shapes ----------------------------------------------------------------------------------


SHAPE = {
    "name": str,
    "number": float,
    "whole?": (int, None),
    "rows": a_count,
    "list": [{"x": float}],
    "map": {a_name: {str: [int]}},
}
FOUND = {"name": "a", "number": 1, "rows": 0, "list": [{"x": 0.5}], "map": {"t": {"u": [1, 2]}}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 3}, "name: expected text, got 3"),
        ({"number": "1"}, "number: expected a finite number, got '1'"),
        ({"number": True}, "number: expected a finite number, got True"),
        ({"number": float("nan")}, "number: expected a finite number, got nan"),
        ({"number": 10**90}, "number: expected a finite number, got 1000"),
        ({"whole": 1.5}, "whole: expected a whole number or null, got 1.5"),
        ({"rows": -1}, "rows: expected a whole number from 0, got -1"),
        ({"list": {"x": 1}}, "list: expected a list, got {'x': 1}"),
        ({"list": [{"x": 1}, {}]}, r"list\[1\].x: expected a finite number, got none"),
        ({"map": {"../t": {}}}, "map: expected keys that are names without sep.*, got '../t'"),
        ({"map": {"t": {"u": [1, "2"]}}}, r"map.t.u\[1\]: expected a whole number, got '2'"),
        ({"map": None}, "map: expected a mapping, got None"),
    ],
)
def test_a_shape_names_the_field(change, message):
    require_shape("x.json", FOUND, SHAPE, "Copy it again.")
    require_shape("x.json", {**FOUND, "more": None, "whole": None}, SHAPE, "Copy it again.")
    with pytest.raises(SourceError, match=rf"^x\.json is damaged: {message}.* Copy it again\.$"):
        require_shape("x.json", {**FOUND, **change}, SHAPE, "Copy it again.")


def test_a_shape_names_every_field():
    with pytest.raises(ConfigError, match=r"name: .*; |name: .*, number: .*, rows: .* and 2 more"):
        require_shape("x.json", {}, SHAPE, "Copy it again.", ConfigError)


# ---- adapters ------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path):
    torch.manual_seed(0)
    deep = "deep" * 12
    weights = {f"{deep}.layers.{i}.q.weight": torch.randn(4, 6) for i in range(2)}
    save_file(weights, tmp_path / "base.safetensors")
    factors = {}
    for name in weights:
        stem = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        factors |= {f"{stem}A.weight": torch.randn(2, 6), f"{stem}B.weight": torch.randn(4, 2)}
    (tmp_path / "ad").mkdir()
    save_file(factors, tmp_path / "ad" / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "use_rslora": False,
        "fan_in_fan_out": False,
        "alpha_pattern": {r"layers\.0\.q": 8},
        "rank_pattern": {r"layers\.1\.q": 2},
        "modules_to_save": ["head"],
        "target_modules": ["q"],
        "bias": "none",
        "init_lora_weights": True,
        "base_model_name_or_path": "base.safetensors",
        "revision": None,
    }
    path = tmp_path / "ad" / "adapter_config.json"
    path.write_text(json.dumps(settings))

    def use():
        source = Lora(str(tmp_path / "ad"), SafetensorsFile(str(tmp_path / "base.safetensors")))
        opened = source.open()
        return {name: opened.read(name) for name in opened.infos}

    return path, settings, use


def test_damaged_settings_of_an_adapter(adapter):
    path, settings, use = adapter
    expected = use()
    read = survivors(path, settings, use, "ad")
    # what may be missing or null has PEFT's default; all that has another type is refused
    kinds = {label for label in read if not label.endswith((": missing", ": null"))}
    assert {label.partition(":")[0].partition(".")[0] for label in kinds} <= {
        "lora_alpha",  # any finite number
        "alpha_pattern",
        "rank_pattern",
        "use_rslora",
        "fan_in_fan_out",
        "modules_to_save",
        "target_modules",
        "init_lora_weights",
        "base_model_name_or_path",
        "revision",
    }
    assert not [k for k in kinds if k.endswith((": nan", ": inf", ": huge", ": deep"))]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in use().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 3}, r"layers\.0\.q\.weight: factors of rank 2, adapter_config\.json 3"),
        ({"rank_pattern": {"q": 4}}, "factors of rank 2, adapter_config.json 4"),
        ({"alpha_pattern": {"(a": 1}}, r"adapter_config\.json: alpha_pattern: invalid regular"),
        ({"alpha_pattern": [["q", 1]]}, "alpha_pattern: expected a mapping or null, got"),
        ({"lora_alpha": "8"}, "lora_alpha: expected a finite number, got '8'"),
        ({"use_rslora": "yes"}, "use_rslora: expected true or false or null, got 'yes'"),
        ({"modules_to_save": "head"}, "modules_to_save: expected a list or null, got 'head'"),
    ],
)
def test_settings_that_do_not_fit(adapter, change, message):
    path, settings, use = adapter
    path.write_text(json.dumps({**settings, **change}))
    with pytest.raises(SourceError, match=message):
        use()


# ---- compact folders -----------------------------------------------------------------------------


@pytest.fixture
def compact(tmp_path):
    torch.manual_seed(0)
    base = tmp_path / "base.safetensors"
    save_file({"w": torch.randn(4, 3)}, base)
    folder = tmp_path / "compact"
    (folder / "tasks" / "a").mkdir(parents=True)
    save_file({"w": torch.randn(4, 3)}, folder / "unified.st")
    save_file({"w": torch.tensor([255, 15], dtype=torch.uint8)}, folder / "tasks/a/masks.st")
    save_file({"head": torch.randn(2, 3)}, folder / "tasks/a/own.st")
    described = {
        "format": "gradmerge-emr-1",
        "base": {"from": str(base), "sha256": SafetensorsFile(str(base)).open().fingerprint()},
        "scales": {"a": 0.5},
    }
    path = folder / "emr.json"
    path.write_text(json.dumps(described))

    def use(base=None):
        opened = EMR(str(folder), "a", base).open()
        return {name: opened.read(name) for name in opened.infos}

    return path, described, use


def test_damaged_descriptions_of_a_compact_folder(compact):
    path, described, use = compact
    read = survivors(path, described, use, "compact")
    assert fields_of(read) == {"scales.a"}
    assert {label.rpartition(": ")[2] for label in read} == {"half", "1e308"}


@pytest.mark.parametrize("file", ["unified.st", "tasks/a/masks.st", "tasks/a/own.st"])
def test_damaged_files_of_a_compact_folder(compact, file):
    path, _, use = compact
    whole = (path.parent / file).read_bytes()
    for content in (b"", whole[:20], whole[:-4], b"[" * 500, whole + b"x"):
        (path.parent / file).write_bytes(content)
        with pytest.raises(SourceError, match=rf"{Path(file).name}: expected a complete"):
            use()
    if "own" not in file:
        for other in ({"w": torch.zeros(5)}, {"v": torch.zeros(4, 3)}, {"w": torch.ones(2).int()}):
            save_file(other, path.parent / file)
            with pytest.raises(SourceError, match="the files do not fit the base"):
                use()


def test_bases_that_name_each_other(compact, adapter, tmp_path):
    path, described, use = compact
    described["base"]["from"] = str(path.parent / "tasks" / "a")
    path.write_text(json.dumps(described))
    with pytest.raises(SourceError, match=r"got a circle: .*compact -> .*compact\. Give the base"):
        use()
    path, settings, use = adapter
    (tmp_path / "other").mkdir()
    for folder, base in (("ad", "other"), ("other", "ad")):
        settings["base_model_name_or_path"] = str(tmp_path / base)
        (tmp_path / folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(SourceError, match=r"got a circle: .*ad -> .*other -> .*ad\. Give the base"):
        as_source(str(tmp_path / "ad"))
    settings["base_model_name_or_path"] = str(tmp_path / "ad")
    path.write_text(json.dumps(settings))
    with pytest.raises(SourceError, match=r"got a circle: .*ad -> .*ad\. Give the base"):
        as_source(str(tmp_path / "ad"))
    assert use()  # with a base of the recipe


# ---- statistics ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["kfac", "fisher"])
def test_damaged_statistics(tmp_path, kind):
    folder = tmp_path / "found"
    shutil.copytree(FIXTURES / "statistics" / kind, folder)
    path = folder / "statistics.json"
    data = json.loads(path.read_text())
    del data["versions"], data["data"]
    data["collected"][kind]["step"] = {}
    sources = data["collected"][kind]["sources"]
    data["collected"][kind]["sources"] = {"a": sources["a"]}
    for source in sources.values():
        source["tensors"] = dict(list(source["tensors"].items())[:1])

    def use():
        opened = SourceStatistics(folder)
        opened.summary()
        for name, source in opened.index["collected"][kind]["sources"].items():
            for tensor in list(source["tensors"])[:1]:
                opened.read(kind, name, tensor)

    def use_all():
        try:
            use()
        except KeyError as error:
            raise ConfigError(f"statistics: none of {error}") from error  # as `require` says

    read = survivors(path, data, use_all, "statistics")
    # what differs must be a value that another folder could have, or a part that is missing
    wrong = ("nan", "inf", "negative", "huge", "deep", "list of null", "true", "null")
    inner = [label for label in read if label.startswith(f"collected.{kind}.sources.")]
    assert not [label for label in inner if label.endswith(wrong)]


def test_damaged_statistics_of_units(tmp_path):
    folder = tmp_path / "found"
    shutil.copytree(FIXTURES / "statistics" / "units", folder)
    path = folder / "statistics.json"
    data = json.loads(path.read_text())
    del data["versions"], data["data"]
    found = data["collected"]["activations"]
    found["step"] = {}
    sources, found["groups"] = found["sources"], dict(list(found["groups"].items())[:1])
    for group in found["groups"].values():
        group["places"] = group["places"][:1]
    prints = {name: source["fingerprint"] for name, source in sources.items()}

    def use():
        try:
            CollectedActivations(str(folder), PermutationSpec({}, {}), prints)
        except ConfigError as error:
            if "is of other groups of units" not in str(error):  # of the whole file, too
                raise

    survivors(path, data, use, "statistics")


def test_damaged_tensors_of_statistics(tmp_path):
    folder = tmp_path / "found"
    shutil.copytree(FIXTURES / "statistics" / "gram", folder)
    source = SourceStatistics(folder).index["collected"]["gram"]["sources"]["a"]
    tensor = next(iter(source["tensors"]))
    file = folder / source["tensors"][tensor]["file"]
    whole = file.read_bytes()
    for content in (b"", whole[:100], whole[:-1]):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=rf"{file.name} cannot be read"):
            SourceStatistics(folder).read("gram", "a", tensor)
    save_file({"gram:other": torch.ones(2, 2)}, file)
    with pytest.raises(ConfigError, match=rf"{file.name} cannot be read .*gram:"):
        SourceStatistics(folder).read("gram", "a", tensor)
    for value in (torch.full((1, 8, 8), torch.nan), torch.ones(1, 8, 8, dtype=torch.int32)):
        save_file({f"gram:{tensor}": value}, file)
        with pytest.raises(ConfigError, match="expected finite numbers in gram:"):
            SourceStatistics(folder).read("gram", "a", tensor)


# ---- jobs, provenance, coefficients --------------------------------------------------------------


def test_damaged_records_of_jobs(tmp_path):
    data = json.loads((FIXTURES / "jobs/pairwise/driver/job.json").read_text())
    data["content"] = {"driver": data["content"]["driver"]}
    path = tmp_path / "job.json"
    read = survivors(path, data, lambda: read_json(path, job=str, seed=(int, None), content=dict))
    texts = {"job: text", "job: empty text", "job: a path"}
    assert {label for label in read if label.startswith("job:")} == texts
    step = {"step": {"recipe": {"class_path": "x"}}, "result": {"coefficients": {"a": 1.0}}}
    record = StepRecord(tmp_path, step["step"])
    survivors(tmp_path / STEP, step, lambda: record.result, str(tmp_path))


def test_damaged_provenance(tmp_path):
    data = json.loads((FIXTURES / "export" / "provenance.json").read_text())
    data["driver"] = {"members": ["a", "b"], "sources": {"a": {}}, "steps": [{"lambda": 2.0}]}
    data["recipe"]["init_args"] = {"private": data["recipe"]["init_args"]["private"]}
    data = {key: data[key] for key in ("sources", "tasks", "recipe", "driver")}
    path = tmp_path / "provenance.json"

    def use():
        driver = Continual(earlier=str(tmp_path))
        driver._members, driver._count, driver._scale({})
        _private_of(tmp_path)

    survivors(path, data, use, str(tmp_path))


def test_damaged_metadata_of_coefficients(tmp_path):
    path = tmp_path / "coefficients.safetensors"
    tensor, slot = MergeTensor("w", (2, 2), 1), Slot("w", "scalar", ())
    context = InitContext(("a", "b"), {"w": tensor}, lambda: torch.ones(2))

    def use(sources='["a", "b"]', slots='{"w": "scalar"}', value=(1.0, 2.0)):
        save_file({"w": torch.tensor(value)}, path, {"sources": sources, "slots": slots})
        return FromFile(str(path)).coefficient(tensor, slot, context)

    assert use().tolist() == [1, 2]
    assert use('["b", "a"]').tolist() == [2, 1]
    for sources in ("", "[", "3", '"ab"', '{"a": 1}', "[1, 2]", "[null]", "[" * 100_000):
        with pytest.raises(ConfigError, match=r"FromFile: .*coefficients\.safetensors"):
            use(sources)
    for slots in ("", "[]", '{"w": 1}', '{"w": null}', '{"w": {}}', '{"w": "a", "w": "b"}'):
        with pytest.raises(ConfigError, match=r"FromFile: .*coefficients\.safetensors"):
            use(slots=slots)
    for value in ((1.0, float("nan")), (float("inf"), 1.0), 1.0, (1.0, 2.0, 3.0)):
        with pytest.raises(ConfigError, match="FromFile"):
            use(value=value)


# ---- checkpoints ---------------------------------------------------------------------------------


def test_damaged_checkpoints():
    models = relatives(build())
    recipe = Recipe({"a": models[1], "b": models[2]}, base=models[0])
    merged = MergedModel(recipe)
    scores = {"test": {"a": {"accuracy": 0.5, "perplexity": float("inf")}}}
    saved = to_save(merged, True, scores, scores)
    saved["fixed"] = {"body.bias": 0.0}
    restore(merged, {"gradmerge": copy.deepcopy(saved)})
    refused, other = [], []
    for label, changed in mutations(saved):
        try:
            restore(merged, {"gradmerge": changed})
        except (GradmergeError, ValueError) as error:  # ValueErrors are given the file's name
            named = (
                "the checkpoint is damaged: ",
                "the coefficients were trained on",
                "it fixes",
                "its tasks",
            )
            (refused if str(error).startswith(named) else other).append(f"{label}: {error}")
    assert len(refused) > 150
    assert not other


def test_patterns_of_an_adapter_that_never_end(adapter, monkeypatch):
    path, settings, use = adapter
    monkeypatch.setattr(patterns, "SECONDS", 0.05)
    for option in ("alpha_pattern", "rank_pattern"):
        never = {option: {"([a-z0-9.]|[a-z0-9.]{2})+X?Y?[^a-z]": 2}}
        path.write_text(json.dumps({**settings, **never}))
        with pytest.raises(SourceError, match=rf"ad: {option}: the regular expression .* takes"):
            use()
