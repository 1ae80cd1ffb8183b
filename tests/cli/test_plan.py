"""`gradmerge plan`, and the fits that are refused because they cannot fit into memory."""

from __future__ import annotations

import io
import json
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace

import pytest
import torch

from commands import fails
from gradmerge.cli import main, plan, room
from gradmerge.cli.learning import learn
from gradmerge.cli.plan import rendered
from gradmerge.cli.room import Machine
from gradmerge.engine.placement import PLACES
from gradmerge.sources.files import FileCheckpoint
from gradmerge.training import calibrate
from gradmerge.training import planned as training_planned
from tiny import write_yaml

pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.fixture(scope="module")
def config(world, tmp_path_factory):
    return write_yaml(tmp_path_factory.mktemp("configured") / "fit.yaml", world)


def machine(monkeypatch, whole):
    monkeypatch.setattr(room, "machine_of", lambda device: Machine((whole, whole), None, 0))


@pytest.fixture(scope="module")
def found(config):
    """The plan that the command makes, and what it prints as JSON."""
    made, out = [], io.StringIO()
    planned = plan.planned
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out):
        machine(patch, 1 << 40)
        patch.setattr(plan, "planned", lambda cli: made.append(planned(cli)) or made[0])
        assert main(["plan", "--config", config, "--format", "json"]) == 0
    return made[0], json.loads(out.getvalue())


def test_every_setting_is_listed_and_the_fastest_that_fits_recommended(found):
    plain = found[1]
    chosen = [setting["setting"] for setting in plain["settings"]]
    names = [(s["memory"], s["activation_checkpointing"]) for s in chosen]
    assert names == [(m, c) for m in ("resident", "streamed") for c in (False, True)]
    assert {s["fits"] for s in plain["settings"]} == {"yes"}
    best = min(plain["settings"], key=lambda s: s["seconds"])
    assert plain["recommended"] == best["options"]
    assert plain["configured"]["memory"] == "resident"
    assert plain["sources"] == 2
    for setting in plain["settings"]:
        assert 0 < setting["parts"]["merged"] < setting["device"] <= setting["host"]


def test_the_table_names_what_fits_and_what_does_not(found):
    planned, plain = found
    text = rendered(planned)
    assert "BertForSequenceClassification" in text
    assert f"recommended  {plain['recommended']}" in text
    assert "resident *" in text
    small = rendered(replace(planned, machine=Machine((1, 1), None, 0)))
    assert "recommended  none fits: reduce data.batch_size" in small
    assert small.count(" no ") == 4


def test_what_is_within_the_error_is_tight(found):
    planned = found[0]
    first = planned.estimates[0]
    for share, verdict in ((0.75, "no"), (1.0, "tight"), (1.25, "yes")):
        size = int(first.host * share)
        assert replace(planned, machine=Machine((size, size), None, 0)).fits(first) == verdict


def test_a_driver_has_no_plan(config, capsys):
    driver = ["--driver", "Pairwise"]
    assert "expected a single fit to plan, got a driver" in fails(
        ["plan", "--config", config, *driver], capsys
    )


def test_help_is_that_of_its_own_options(capsys):
    assert main(["plan", "--help"]) == 0
    assert "--format {table,json}" in capsys.readouterr().out


def test_a_fit_that_cannot_fit_is_refused_before_weights_are_read(
    config, found, monkeypatch, capsys
):
    sizes = {setting["options"]: setting["host"] for setting in found[1]["settings"]}
    most = int(min(sizes.values()) * 0.95)  # the smallest setting is within the error
    fitting = next(options for options, size in sizes.items() if size * (1 - room.MARGIN) <= most)
    machine(monkeypatch, most)
    monkeypatch.setattr(FileCheckpoint, "read", lambda *_: pytest.fail("a weight was read"))
    said = fails(["fit", "--config", config], capsys)
    assert "model.memory: expected a fit of at most" in said
    assert f"This fits: {fitting}." in said
    monkeypatch.setattr(training_planned, "settings", lambda device: [])
    said = fails(["fit", "--config", config], capsys)
    assert "No setting fits: reduce data.batch_size" in said


def test_a_merge_without_a_yaml_is_streamed_where_it_would_not_fit(world, found, monkeypatch):
    config = {key: world[key] for key in ("model", "data")}
    for share, memory in ((2.0, "resident"), (0.9, "streamed")):
        machine(monkeypatch, int(found[0].estimates[0].host * share))
        assert plan.memory_for(config) == memory


def test_the_check_can_be_left_out(config, monkeypatch):
    machine(monkeypatch, 1 << 10)
    monkeypatch.setenv("GRADMERGE_PLAN", "off")
    assert main(["fit", "--config", config, "--trainer.fast_dev_run", "true"]) == 0


def test_configured_placements_are_planned_and_those_without_a_device_refused(
    config, capsys, monkeypatch
):
    monkeypatch.setattr(training_planned, "settings", lambda device: [training_planned.Setting()])
    mixed = ["--model.placement", '{"base": "device", "*": "mapped"}', "--format", "json"]
    assert main(["plan", "--config", config, *mixed]) == 0
    plain = json.loads(capsys.readouterr().out)
    last = plain["settings"][-1]
    assert len(plain["settings"]) == 2
    assert last["setting"] == plain["configured"]
    assert last["parts"]["sources"] > 0
    assert last["options"].endswith("""--model.placement '{"*": "mapped", "base": "device"}'""")
    said = fails(["fit", "--config", config, "--model.placement", "pinned"], capsys)
    assert "placement: expected device or mapped on cpu, got pinned for base, " in said
    said = fails(["fit", "--config", config, "--model.placement.nobody", "device"], capsys)
    assert "placement: unknown sources nobody (choose from base, " in said


def test_a_device_is_planned_with_every_place_and_auto_takes_the_first_with_room(
    config, monkeypatch
):
    """The device is one of tensors without numbers, with a memory that is said here."""
    device, gb = torch.device("meta"), 10**9
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(room, "device_of", lambda cli: device)
    speed = calibrate.Speed(1e12, 1e12, 1e12, 1e12, 1e4, 2e4)
    monkeypatch.setattr(calibrate, "calibrate", lambda *_: speed)
    settings = [training_planned.Setting(placement=place) for place in PLACES]
    monkeypatch.setattr(training_planned, "settings", lambda device: settings)
    monkeypatch.setattr(room, "machine_of", lambda d: Machine((gb, gb), (gb, gb), 0))
    cli = learn(["--config", config], run=False, opens=False)
    found = plan.planned(cli)
    assert not found.failures
    assert found.chosen == settings[0]
    device, pinned, mapped = found.estimates
    seconds = [speed.seconds(each) for each in found.estimates]
    assert seconds == sorted(seconds)
    assert seconds[1] == pytest.approx(pinned.read / 2e4)  # hides the computation
    assert seconds[2] == pytest.approx(seconds[0] + mapped.read / 1e4)
    assert found.recommended is device
    assert rendered(found).count(" device ") == rendered(found).count(" pinned ") == 1
    for host, most, best in ((gb, 0.8, pinned), (pinned.host * 0.8, 0.8, mapped)):
        size = int(device.device * most)
        machine = Machine((int(host), int(host)), (size, size), 0)
        assert replace(found, machine=machine).recommended is best
