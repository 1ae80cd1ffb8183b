"""Exports that are killed at any moment, their memory, and failing writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from gradmerge.export import writer

KILLED = """
import hashlib, json, os, random, shutil, signal, sys, time
from pathlib import Path
import torch
from gradmerge import Recipe
from gradmerge.engine.opening import open_plan
from gradmerge.engine.state import FitState
from gradmerge.export.folder import export_state
from gradmerge.export.atomic import _exchanged

torch.set_num_threads(1)  # threads of OpenMP do not survive a fork
root = Path(sys.argv[1])
(root / "x").mkdir(), (root / "y").mkdir()
exchanges = _exchanged(root / "x", root / "y")
torch.manual_seed(0)
base, a, b = ({f"t{i}": torch.randn(64, 512) for i in range(12)} for _ in range(3))
plan = open_plan(Recipe({"a": a, "b": b}, base=base), with_skeleton=False)
plan.fingerprints
target = root / "merged"

def write(value):
    raw = {key: torch.full_like(z, value) for key, z in plan.initial_raw().items()}
    export_state(FitState(plan, raw), target, overwrite=True, max_shard_size=500_000)

def state():
    if not target.exists():
        return "absent"
    digest = hashlib.sha256()
    for path in sorted(target.glob("*.safetensors*")):
        digest.update(path.name.encode() + path.read_bytes())
    names = sorted(path.name for path in target.iterdir())
    return digest.hexdigest() + ",".join(names)

known = {}
for name, value in (("old", 0.2), ("new", 0.7)):
    started = time.perf_counter()
    write(value)
    duration = time.perf_counter() - started
    known[state()] = name
assert len(known) == 2
random.seed(0)
counts = {}
for trial in range(60):
    shutil.rmtree(target, ignore_errors=True)
    existing = trial % 3 != 0
    if existing:
        write(0.2)
    child = os.fork()
    if child == 0:
        write(0.7)
        os._exit(0)
    # However fast the machine is: some are killed at once, some finish, most fall between.
    if trial % 10 != 2:
        time.sleep(0 if trial % 10 == 1 else random.uniform(0, 1.3 * duration))
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found = state()
    outcome = "absent" if found == "absent" else known.get(found, "half")
    key = ("over old: " if existing else "alone: ") + outcome
    counts[key] = counts.get(key, 0) + 1
    left = len(list(root.glob(".merged.*")))
    counts["left"] = max(counts.get("left", 0), left)
write(0.2)
counts["left at last"] = len(list(root.glob(".merged.*")))
print(json.dumps({**counts, "exchanges": exchanges}))
"""

MEMORY = """
import json, struct, sys, threading, time
from pathlib import Path
import torch
from gradmerge import Recipe
from gradmerge.engine.opening import open_plan
from gradmerge.engine.state import FitState
from gradmerge.export.folder import export_state

root = Path(sys.argv[1])
count, size = 40, 2_500_000
header = {
    f"layers.{i}.weight": {"dtype": "F32", "shape": [1000, size // 1000],
                           "data_offsets": [4 * size * i, 4 * size * (i + 1)]}
    for i in range(count)
}
text = json.dumps(header).encode()
text += b" " * (-len(text) % 8)
for name in ("base", "a"):
    with (root / f"{name}.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + 4 * size * count)  # zeros that take no disk
        for i in range(count if name == "a" else 0):  # but for one number, to merge something
            file.seek(8 + len(text) + 4 * size * i)
            file.write(struct.pack("<f", 1.0))

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

peak, stop = [0], threading.Event()

def watch():
    while not stop.is_set():
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.003)

recipe = Recipe({"a": str(root / "a.safetensors")}, str(root / "base.safetensors"))
plan = open_plan(recipe, with_skeleton=False)
before = anonymous()
thread = threading.Thread(target=watch, daemon=True)
thread.start()
export_state(FitState.start(plan), root / "merged")
stop.set()
thread.join()
written = sum(path.stat().st_size for path in (root / "merged").glob("model*.safetensors"))
print(json.dumps({"grown": peak[0] - before, "written": written}))
"""


def run(script, folder):
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_a_killed_export_leaves_the_old_folder_or_the_new_one(tmp_path):
    counts = run(KILLED, tmp_path)
    exchanges, left = counts.pop("exchanges"), counts.pop("left")
    # what dead runs leave is removed by the next export to the name
    assert left == 1
    assert counts.pop("left at last") == 0
    assert sum(counts.values()) == 60
    if exchanges:  # the name is never without a folder
        assert "over old: absent" not in counts
    assert not [outcome for outcome in counts if outcome.endswith("half")], counts
    # kills fell before and after the folder took its name
    assert counts["over old: old"] > 0
    assert counts["over old: new"] > 0
    assert counts["alone: absent"] > 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_export_holds_a_tensor_at_a_time(tmp_path):
    found = run(MEMORY, tmp_path)
    assert found["written"] > 400_000_000
    # the merged tensor, its chunk buffers and blocks that malloc keeps: 10 MB per tensor
    assert found["grown"] < 60_000_000, found


@pytest.mark.parametrize("failing", [0, 3, 7])
def test_a_write_that_fails_behind_the_merge_stops_it(tmp_path, monkeypatch, failing):
    """A full disk raises in another thread, after the tensor was computed."""
    calls = iter(range(100))
    original = writer._Behind._whole

    def whole(self, view):
        if next(calls) == failing:
            raise OSError(28, "No space left on device")
        original(self, view)

    monkeypatch.setattr(writer._Behind, "_whole", whole)
    entries = [
        writer.Entry(f"t{i}", (3, i), torch.float32, lambda i=i: torch.full((3, i), float(i)))
        for i in range(7)
    ]
    with pytest.raises(OSError, match="No space left"):
        writer.write_safetensors(tmp_path / "x.safetensors", entries)


def test_tensors_written_behind_are_those_that_were_made(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "_BEHIND", 50)
    made = {f"t{i}": torch.full((i, 2), i, dtype=torch.bfloat16) for i in range(20)}
    entries = [
        writer.Entry(name, tuple(tensor.shape), tensor.dtype, tensor.clone)
        for name, tensor in made.items()
    ]
    writer.write_safetensors(tmp_path / "x.safetensors", entries)
    got = load_file(tmp_path / "x.safetensors")
    assert got.keys() == made.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in made.items())
