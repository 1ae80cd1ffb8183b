"""Places of sources in fits: bytes over the bus (on tensors without numbers), and when they end."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from gradmerge import MergeModule, Recipe
from gradmerge.coefficients import Column
from gradmerge.common.errors import ConfigError
from gradmerge.common.memory import host_memory
from gradmerge.engine.headers import HeaderPlan
from gradmerge.engine.opening import Opening
from gradmerge.engine.placement import PLACES
from gradmerge.engine.plan import Plan
from gradmerge.engine.traced import Trace
from gradmerge.objectives import KLToSource, Objective
from gradmerge.operators import Linear, Slerp
from gradmerge.preprocess import Trim
from gradmerge.training import placing
from gradmerge.training.data import MergeDataModule
from gradmerge.training.examples import TaskData
from gradmerge.training.planned import Fit, Setting, estimate, settings
from harness_tasks import save_llamas
from tiny import fit, module_of, raws, trainer_of, validate, vectors

DEVICE = torch.device("meta")
"""Stands for a GPU: builds of torch without CUDA run no backward on its tensors, even fake ones."""


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch):
    """It does not know the device, and does nothing here."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return save_llamas(tmp_path_factory.mktemp("crossing"), torch.bfloat16)


class Crossing(Trace):
    """Counts the bytes copied from the host to the device, by dtypes on both."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[0] if func is torch.ops.aten._to_copy.default else args[1]
            if source.device.type == "cpu" and out.device.type == "meta":
                self.work[f"{source.dtype} as {out.dtype}"] += out.nbytes
        return out


class Merging(HeaderPlan):
    """Merges by the operators themselves, on tensors without numbers."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.trace = Crossing()

    combine, contract = Plan.combine, Plan.contract


def crossing(places, setting, monkeypatch, tasks="a", objective=None, **options):
    """Return the bytes that cross in a step of a fit on a device, and the entries of the model."""
    opening = Opening(Recipe({name: places[name] for name in "ab"}, places["base"], **options))
    made = []

    def headers(opening):
        made.append(opening.plan(keep_network=True, kind=Merging))
        return made[0]

    monkeypatch.setattr("gradmerge.training.planned.headers", headers)
    steps = []
    totals = Trace.totals
    monkeypatch.setattr(Trace, "totals", lambda self: steps.append(totals(self)) or steps[-1])
    data = MergeDataModule(
        {t: TaskData("unread", "causal_lm", max_length=8, source=t) for t in tasks}, batch_size=2
    )
    optimise = partial(torch.optim.Adam, lr=0.1)
    estimate(
        opening, Fit(data, objective or Objective(), torch.bfloat16, optimise, DEVICE), setting
    )
    before, after = steps
    found = {name: after[name] - before[name] for name in after if " as " in name}
    entries = sum(torch.Size(info.shape).numel() for info in opening.reference.infos.values())
    return {name: size for name, size in found.items() if size}, entries


BF16, FP32 = "torch.bfloat16 as torch.bfloat16", "torch.float32 as torch.float32"


@pytest.mark.parametrize("operator", [Linear(), Slerp()], ids=lambda o: type(o).__name__)
def test_sources_cross_the_bus_in_their_stored_dtype(places, monkeypatch, operator):
    found, entries = crossing(
        places, Setting(placement="mapped"), monkeypatch, operator=operator, coefficients=Column()
    )
    # a base and two sources for the merge, and again for the contraction
    assert found.pop(BF16) == 2 * 3 * 2 * entries
    found.pop("torch.int64 as torch.int64", 0)  # the batch
    assert sum(found.values()) < entries / 10  # nothing is widened before
    assert not any(name.startswith("torch.bfloat16 as") for name in found)


def test_copies_made_ahead_are_those_that_are_used(places, monkeypatch):
    found, _ = crossing(places, Setting("streamed", True, "pinned"), monkeypatch)
    plain, _ = crossing(places, Setting("streamed", True, "mapped"), monkeypatch)
    assert plain[BF16] <= found[BF16] <= 1.2 * plain[BF16]  # wrong guesses where passes turn


def test_nothing_crosses_that_is_on_the_device(places, monkeypatch):
    taught = {"objective": Objective([KLToSource()]), "tasks": "ab"}
    found, entries = crossing(places, Setting(placement="device"), monkeypatch, **taught)
    assert BF16 not in found
    mixed = Setting(placement=(("*", "device"), ("b", "mapped")))
    found, entries = crossing(places, mixed, monkeypatch, **taught)
    assert found[BF16] == 2 * 2 * entries + 2 * entries  # b in merge, contraction and as teacher


@pytest.mark.parametrize("place", ["mapped", "device"])
def test_processed_directions_are_placed_too(places, monkeypatch, place):
    setting = Setting(placement=place)
    found, entries = crossing(places, setting, monkeypatch, preprocess=[Trim(0.5)])
    if place == "device":
        assert sum(found.values()) < entries / 10
    else:
        assert found[BF16] == 2 * 2 * entries  # the base
        assert 0 <= found[FP32] - 2 * 2 * 4 * entries < entries / 10


def test_a_plan_lists_every_place_and_counts_its_copies(places):
    opening = Opening(Recipe({name: places[name] for name in "ab"}, places["base"]))
    data = MergeDataModule({"a": TaskData("unread", "causal_lm", max_length=8)}, batch_size=2)
    plan = Fit(data, Objective(), torch.bfloat16, torch.optim.Adam, DEVICE)
    entries = sum(torch.Size(info.shape).numel() for info in opening.reference.infos.values())
    assert [s.placement for s in settings(DEVICE)] == [p for p in PLACES for _ in range(4)]
    found = {p: estimate(opening, plan, Setting(placement=p)) for p in PLACES}
    assert found["device"].parts["sources"] == 3 * 2 * entries
    assert (found["device"].pinned, found["device"].mapped) == (0, 0)
    for place in ("pinned", "mapped"):
        own = found[place]
        assert own.parts.get("sources", 0) < 3 * 2 * entries
        assert getattr(own, place) == own.read == found["device"].read > 0
    assert found["pinned"].host - found["mapped"].host >= 3 * 2 * entries
    mixed = Setting(placement=(("*", "mapped"), ("a", "device")))
    assert mixed.options.endswith("""--model.placement '{"*": "mapped", "a": "device"}'""")


# ---- fits and evaluations -----------------------------------------------------------------------


def test_a_fit_places_its_sources_says_so_and_frees_them(tmp_path, caplog):
    torch.manual_seed(3)
    plain, _ = fit(tmp_path, module_of(), max_steps=6)
    torch.manual_seed(3)
    module = module_of(placement={"a": "device"})
    placed = []
    unload = type(module.merged.plan).unload
    with pytest.MonkeyPatch.context() as patch, caplog.at_level("INFO"):
        patch.setattr(
            Plan, "unload", lambda self: placed.append(self.placed is not None) or unload(self)
        )
        fit(tmp_path, module, max_steps=6)
    assert placed == [True, False]  # when training ends, before the export
    assert module.merged.plan.placed is None
    assert torch.equal(raws(module)["tensor"], raws(plain)["tensor"])
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("sources:")]
    assert len(lines) == 1
    assert "a: on the device, 3.32e-07 GB in float32; " in lines[0]
    assert lines[0].endswith("in files, 6.64e-07 GB in float32.")
    trainer = trainer_of(tmp_path)
    assert validate(trainer, module, vectors())
    assert module.merged.plan.placed is not None  # for the next one
    trainer.test(module, vectors(), verbose=False)
    assert module.merged.plan.placed is None


def test_the_old_option_means_the_device_with_a_warning():
    with pytest.warns(UserWarning, match="load_sources is deprecated: use placement: device"):
        module = module_of(load_sources=True)
    assert module.placement == module.hparams["placement"] == "device"
    assert "load_sources" not in module.hparams
    with pytest.raises(ConfigError, match="load_sources: expected one of load_sources and placem"):
        module_of(load_sources=True, placement="mapped")
    with pytest.raises(ConfigError, match="placement: unknown sources c"):
        module_of(placement={"c": "device"})


def test_page_locked_memory_is_refused_on_a_cpu_before_data_are_read(tmp_path):
    module = module_of(placement="pinned")
    with pytest.raises(ConfigError, match="expected device or mapped on cpu, got pinned for base"):
        fit(tmp_path, module, max_steps=1)


@pytest.mark.parametrize(
    ("sizes", "free", "step", "expected"),
    [
        (100, 900, None, 900),  # small sources need no plan
        (500, 900, None, 450),  # half, where a step is not known
        (500, 900, 200, 670),  # else what a step leaves, which is known to 15%
        (500, 900, 1000, -250),
    ],
)
def test_room_for_sources_is_what_a_planned_step_leaves(monkeypatch, sizes, free, step, expected):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free - 50, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 80)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 30)
    device, host = placing._rooms(DEVICE, sizes, lambda: step)
    assert device == pytest.approx(expected)
    assert 0 < host < host_memory()[0]


def test_sources_that_do_not_fit_after_all_are_read_from_files(monkeypatch):
    plan, placed = module_of().merged.plan, []

    def full(words, device, asked):
        placed.append(words)
        if "device" in words.values():
            raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(placing, "_rooms", lambda *_: (1 << 40, 0))
    monkeypatch.setattr(plan, "place", full)
    with pytest.warns(UserWarning, match="sources that were to be copied are read from files: ful"):
        placing.place(plan, {"a": "mapped"}, torch.device("cuda"))
    assert placed[0] == {"base": "device", "a": "mapped", "b": "device"}
    assert placed[1:] == [dict.fromkeys(plan.owners, "mapped")]
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        placing.place(plan, {"*": "device"}, torch.device("cuda"))


def test_a_step_is_planned_from_the_module_and_its_trainer(tmp_path, places):
    recipe = Recipe({name: places[name] for name in "ab"}, places["base"])
    module = MergeModule(recipe, dtype="bfloat16")
    data = MergeDataModule({"a": TaskData("unread", "causal_lm", max_length=8)}, batch_size=2)

    optimiser = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    module._trainer = SimpleNamespace(datamodule=data, world_size=1, optimizers=[optimiser])
    state = torch.get_rng_state()
    entries = sum(torch.Size(t.shape).numel() for t in module.merged.plan.tensors.values())
    assert 2 * entries < placing._need(module) < 100 * entries
    assert torch.equal(torch.get_rng_state(), state)
    module._trainer.datamodule = object()
    assert placing._need(module) is None
