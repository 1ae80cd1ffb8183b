"""`gradmerge push`: what would go, what is refused, and the upload to a stub of the hub."""

from __future__ import annotations

import base64
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
import torch

from gradmerge import Recipe, merge
from gradmerge.cli import main
from gradmerge.coefficients import Uniform
from gradmerge.common.errors import ConfigError
from gradmerge.export.push import contents, table
from tiny import build, relatives, save_family


class Hub(ThreadingHTTPServer):
    """The part of the hub's interface that an upload of small files needs."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.seen, self.files, self.created = [], {}, None
        self.private, self.status = None, 200

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def reply(self, status, content, **headers):
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        hub = self.server
        hub.seen.append(("GET", self.path))
        if hub.private is None:
            return self.reply(404, {"error": "none"}, X_Error_Code="RepoNotFound")
        return self.reply(200, {"id": "me/merge", "private": hub.private, "sha": "0" * 40})

    def do_POST(self):
        hub = self.server
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub.seen.append(("POST", self.path))
        if hub.status != 200:
            return self.reply(hub.status, {"error": "You don't have the rights"})
        if self.path == "/api/repos/create":
            hub.created = json.loads(sent)
            return self.reply(200, {"url": f"{hub.address}/me/merge", "id": "me/merge"})
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(sent)["files"]]
            modes = [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]
            return self.reply(200, {"files": modes})
        if "/commit/" in self.path:
            for line in map(json.loads, sent.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    hub.files[value["path"]] = base64.b64decode(value["content"])
            url = f"{hub.address}/me/merge/commit/1"
            return self.reply(200, {"commitUrl": url, "commitOid": "1", "success": True})
        return self.reply(200, {})


@pytest.fixture
def hub(monkeypatch):
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_" + "x" * 34)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def merged(tmp_path, family, monkeypatch):
    models, _ = family("llama", dtype=torch.float32)
    paths = save_family(tmp_path / "models", models)
    monkeypatch.chdir(tmp_path)
    recipe = Recipe({"a": paths["a"], "b": paths["b"]}, paths["base"], init=Uniform())
    return merge(recipe, "merged")


def push(*options):
    return main(["push", "merged", "me/merge", *options])


def test_a_dry_run_prints_what_would_go_and_asks_nobody(merged, hub, capsys):
    assert push("--dry-run", "true") == 0
    said = capsys.readouterr().out
    assert "would go to https://huggingface.co/me/merge (private); nothing was uploaded" in said
    size = (merged / "model.safetensors").stat().st_size
    assert re.search(rf"{size / 1000:.1f} kB  model\.safetensors", said)
    total = sum(p.stat().st_size for p in merged.rglob("*") if p.name not in (".gradmerge",))
    assert f"{total / 1000:.1f} kB  in all, {len(list(merged.iterdir())) - 1} files" in said
    assert hub.seen == []


@pytest.mark.parametrize("private", [True, False])
def test_an_upload(merged, hub, capsys, private):
    assert push(*([] if private else ["--private", "false"])) == 0, capsys.readouterr().err
    seen = "private" if private else "public"
    assert hub.created.get("visibility", seen) == seen
    assert hub.created.get("private", private) is private
    assert hub.created.keys() & {"private", "visibility"}
    assert hub.files == {
        path.name: path.read_bytes() for path in merged.iterdir() if path.name != ".gradmerge"
    }
    assert "/me/merge/commit/1 " in capsys.readouterr().out


def test_a_public_repository_is_not_taken_for_a_private_one(merged, hub, capsys):
    hub.private = False
    assert push() == 2
    assert "expected a private repository, but it exists and is public" in capsys.readouterr().err
    assert hub.files == {}
    assert push("--private", "false") == 0
    hub.files, hub.private = {}, True
    assert push() == 0
    assert hub.files
    assert hub.created is None


def test_errors_of_the_hub_and_of_the_login(merged, hub, capsys, monkeypatch):
    hub.status = 403
    assert push() == 2
    assert "me/merge: expected the hub to take the upload" in capsys.readouterr().err
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert push() == 2
    assert "Check the network" in capsys.readouterr().err
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert push() == 2
    assert (
        "me/merge: expected a login at the hub, got none. Run `hf auth" in capsys.readouterr().err
    )
    assert main(["push", "merged", "merge", "--dry-run", "true"]) == 2
    assert "repo: expected owner/name, got 'merge'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    ["notes.txt", "optimizer.pt", "wandb/run.json", ".cache/x", "trainer_state.json", "x.partial"],
)
@pytest.mark.parametrize("listed", [True, False])
def test_leftovers_are_refused(merged, name, listed):
    if not listed:
        (merged / ".gradmerge").unlink()
        if name in ("notes.txt", "wandb/run.json"):
            return  # nothing tells them from files of a model
    (merged / name).parent.mkdir(exist_ok=True)
    (merged / name).write_text("{}")
    with pytest.raises(ConfigError, match=rf"got also {re.escape(name)}\. Uploaded files stay"):
        contents(merged)


@pytest.mark.parametrize("file", ["README.md", "provenance.json", "config.json", "report.html"])
def test_places_of_this_machine_are_refused(merged, tmp_path, file):
    path = merged / file
    path.write_text(path.read_text().replace("llama", f"{tmp_path}/llama"))
    path.write_text(path.read_text() + f"\n<!-- {tmp_path}/llama -->")
    with pytest.raises(ConfigError, match=rf"no places of this machine .* got {file}: "):
        contents(merged)


def test_records_with_paths_are_refused(tmp_path, family, monkeypatch):
    models, _ = family("llama", dtype=torch.float32)
    paths = save_family(tmp_path / "models", models)
    folder = merge(Recipe(dict(paths), init=Uniform()), tmp_path / "out", provenance_paths=True)
    with pytest.raises(ConfigError, match=r"without provenance_paths"):
        contents(folder)


def test_folders_that_are_no_model_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"expected an exported folder, got none there"):
        contents(tmp_path / "none")
    (tmp_path / "notes").mkdir()
    with pytest.raises(ConfigError, match=r"with model\.safetensors, got one with nothing"):
        contents(tmp_path / "notes")
    plain = merge(Recipe(dict(zip("ab", relatives(build()), strict=False))), tmp_path / "plain")
    assert "model.safetensors" in contents(plain)


def test_sizes():
    text = table({"a": 999, "b": 1_500_000, "c": 2_340_000_000})
    assert text.split("\n") == [
        "  999 B  a", " 1.5 MB  b", "2.34 GB  c", "2.34 GB  in all, 3 files",
    ]  # fmt: skip
