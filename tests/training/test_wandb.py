"""Logging to W&B goes on offline, or ends, but never stops a fit."""

from __future__ import annotations

import http.server
import os
import re
import signal
import socket
import subprocess
import threading
from contextlib import contextmanager

import pytest
import wandb
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from wandb.sdk import wandb_setup
from wandb.sdk.lib.module import unset_globals

from gradmerge.cli.defaults import default_loggers, with_csv
from gradmerge.training.callbacks import CoefficientLogger
from gradmerge.training.summary import fit_table
from gradmerge.training.wandb import LastingWandbLogger, unreachable
from tiny import close_wandb_run, fit, module_of

KEY = "0" * 40


@contextmanager
def server(status):
    """A server that answers every request with a status."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_):
            pass

    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{found.server_port}"
    found.shutdown()
    found.server_close()


@pytest.fixture
def online(monkeypatch, tmp_path):
    """W&B as in a new process with a key; a function sets the address of its server."""
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("HOME", str(tmp_path))
    wandb.teardown()
    yield lambda url: monkeypatch.setenv("WANDB_BASE_URL", url)
    close_wandb_run()
    wandb.teardown()


@pytest.mark.parametrize(
    ("status", "trouble"),
    [
        (200, ""),
        (400, ""),
        (401, "127.0.0.1 rejects the key"),
        (403, "127.0.0.1 rejects the key"),
        (404, "127.0.0.1 answers with status 404"),
        (503, "127.0.0.1 answers with status 503"),
    ],
)
def test_a_server_is_asked_before_a_run_is_opened(status, trouble):
    with server(status) as url:
        assert unreachable(url, KEY) == trouble


def test_servers_that_are_not_there_or_silent_are_told(monkeypatch, tmp_path):
    assert unreachable("http://127.0.0.1:9", KEY).startswith("127.0.0.1 cannot be reached (")
    assert "cannot be reached" in unreachable("no address", KEY)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert unreachable(url, KEY, 0.1) == "127.0.0.1 does not answer within 0.1 s"
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert unreachable("http://127.0.0.1:9", None) == "there is no key for 127.0.0.1"
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1 login user password {KEY}\n")
    assert "cannot be reached" in unreachable("http://127.0.0.1:9", None)


def told(caplog):
    return [record.getMessage() for record in caplog.records if "W&B" in record.getMessage()]


def test_a_fit_without_a_network_is_logged_offline_after_one_line(tmp_path, online, caplog):
    online("http://127.0.0.1:9")
    logger = LastingWandbLogger(project="p", save_dir=tmp_path, log_model=True)
    _, trainer = fit(tmp_path, logger=logger, callbacks=[CoefficientLogger()])
    assert trainer.global_step == 4
    (line,) = told(caplog)
    assert line.startswith("W&B: 127.0.0.1 cannot be reached (")
    assert line.endswith("); the run is kept offline (later: `wandb sync`)")
    assert len(list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))) == 1


def test_an_offline_run_starts_and_is_listed_without_warnings_of_wandb(
    tmp_path, online, monkeypatch, capfd
):
    online("http://127.0.0.1:9")
    monkeypatch.delenv("WANDB_SILENT")
    logger = LastingWandbLogger(project="p", save_dir=tmp_path, offline=True)
    _, trainer = fit(tmp_path, logger=logger)
    table = fit_table(trainer, trainer.lightning_module, 1.0).splitlines()
    assert any(re.match(rf"W&B +{re.escape(str(tmp_path))}", line) for line in table)
    said = capfd.readouterr().err
    assert "offline" in said
    assert "WARNING" not in said


def test_a_rejected_key_and_a_missing_one_keep_the_run_offline(
    tmp_path, online, caplog, monkeypatch
):
    with server(401) as url:
        online(url)
        logger = LastingWandbLogger(project="p", save_dir=tmp_path)
        assert logger.experiment.settings.mode == "offline"
    close_wandb_run()
    wandb.teardown()
    monkeypatch.delenv("WANDB_API_KEY")
    logger = LastingWandbLogger(project="p", save_dir=tmp_path)
    assert logger.experiment.settings.mode == "offline"
    lines = told(caplog)
    assert lines[0].startswith("W&B: 127.0.0.1 rejects the key; the run is kept offline")
    assert lines[1].startswith("W&B: there is no key for 127.0.0.1; the run is kept offline")
    assert len(lines) == 2


def test_what_the_client_cannot_start_is_left_out(tmp_path, online, caplog, monkeypatch):
    real = wandb.init

    def init(**options):
        if options.get("mode") != "disabled":
            raise PermissionError(13, "Permission denied", str(tmp_path))
        return real(**options)

    monkeypatch.setattr(wandb, "init", init)
    logger = LastingWandbLogger(project="p", save_dir=tmp_path, offline=True)
    _, trainer = fit(tmp_path, logger=[CSVLogger(tmp_path), logger])
    assert trainer.global_step == 4
    (line,) = told(caplog)
    assert line.endswith("; nothing is logged to it")


def test_a_fit_outlives_the_service_of_w_and_b(tmp_path, online, caplog):
    logger = LastingWandbLogger(project="p", save_dir=tmp_path, offline=True)
    logger.log_metrics({"x": 1.0}, step=0)
    module = module_of()  # the client follows imports, which fail without the service
    listed = subprocess.run(
        ["pgrep", "-P", str(os.getpid()), "-f", "wandb-core"], capture_output=True, text=True
    )
    for number in listed.stdout.split():
        os.kill(int(number), signal.SIGKILL)
        os.waitpid(int(number), 0)
    _, trainer = fit(tmp_path, module, logger=logger, callbacks=[CoefficientLogger()])
    assert trainer.global_step == 4
    (line,) = told(caplog)
    assert line.endswith("; the fit goes on, and logs no more to it")
    # the client cannot close what has lost its service
    unset_globals()
    wandb_setup._singleton = None


def test_configured_loggers_never_stop_a_fit_either(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    stock = WandbLogger(project="mine", name="one", save_dir=tmp_path, offline=True)
    found, csv = with_csv([stock], str(tmp_path))
    assert type(found) is LastingWandbLogger
    assert isinstance(csv, CSVLogger)
    assert (found.name, found._wandb_init["name"], found._offline) == ("mine", "one", True)
    csv, found = default_loggers(str(tmp_path))
    assert (type(found), found.name) == (LastingWandbLogger, "gradmerge")
