"""Logging to W&B that never stops a fit: without a network or a key it goes on offline."""

from __future__ import annotations

import base64
import json
import logging
import netrc
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import WandbLogger
from typing_extensions import override

from gradmerge.common.failures import cause

# Hosts of the service itself; keys of earlier clients are kept under its first name.
_HOSTED = (".wandb.ai", ".coreweave.com")
_SECONDS = 8.0
"""Time in which a server must answer before a run is opened."""
_INIT_SECONDS = 20.0
"""Time that one which has answered has to open the run."""
_FINISH_SECONDS = 300.0
"""Time for uploads at the end; the rest stays on the disk."""


class LastingWandbLogger(WandbLogger):
    """W&B logger that goes on offline, or without W&B, where the stock one stops the fit.

    A run is opened offline if there is no key (the user is never asked for one), if the server
    does not answer within some seconds, or if it rejects the key. What fails later, such as a
    service that has died, ends the logging to W&B alone. Each is one line of the log.
    """

    _ended = False

    @classmethod
    def of(cls, logger: WandbLogger) -> LastingWandbLogger:
        """Return a configured logger that has no run yet as one of this class."""
        lasting = cls.__new__(cls)
        lasting.__dict__.update(logger.__dict__)
        return lasting

    @property
    @override
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run; it is opened at the first use."""
        import wandb

        if self._experiment is None and wandb.run is None and not hasattr(self, "_attach_id"):
            self._open()
        return WandbLogger.experiment.fget(self)  # type: ignore[attr-defined]

    def _open(self) -> None:
        import wandb

        given = dict(self._wandb_init)
        if given.get("anonymous") is None:
            given.pop("anonymous", None)  # W&B warns even of none
        found = wandb.setup().settings
        mode = "offline" if self._offline else given.get("mode") or found.mode
        if mode in ("online", "shared", None):
            trouble = unreachable(str(found.base_url), found.api_key)
            given.setdefault("settings", _settings(wandb))
            if not trouble:
                trouble = self._started(given)
            if not trouble:
                return
            _say(f"{trouble}; the run is kept offline (later: `wandb sync`)")
            self._log_model = False  # checkpoints cannot be uploaded then
            mode = "offline"
        given["mode"] = mode
        trouble = self._started(given)
        if trouble:
            _say(f"{trouble}; nothing is logged to it")
            self._experiment, self._ended = wandb.init(mode="disabled"), True

    def _started(self, given: dict[str, Any]) -> str:
        """Open a run, and return why that failed, or an empty string."""
        self._wandb_init = given
        # `given` has the mode; Lightning would also set WANDB_MODE, of which W&B warns by now
        offline, self._offline = self._offline, False
        try:
            WandbLogger.experiment.fget(self)  # type: ignore[attr-defined]
        except Exception as error:  # the client raises many kinds
            return cause(error)
        finally:
            self._offline = offline
        return ""

    def attempt(self, action: Callable[[], Any]) -> None:
        """Do something with the run; if that fails, log no more to it."""
        if self._ended:
            return
        try:
            action()
        except Exception as error:  # the client raises many kinds
            self._ended = True
            _say(f"{cause(error)}; the fit goes on, and logs no more to it")
            with suppress(Exception):  # or its service is asked again at the exit
                import wandb

                wandb.sdk.lib.import_hooks.unregister_all_post_import_hooks()
                wandb.teardown()

    @override
    def log_hyperparams(self, params: Any) -> None:
        log = super().log_hyperparams
        self.attempt(lambda: log(params))

    @override
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        log = super().log_metrics
        self.attempt(lambda: log(metrics, step))

    @override
    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        self.attempt(
            lambda: super(LastingWandbLogger, self).after_save_checkpoint(checkpoint_callback)
        )

    @override
    def finalize(self, status: str) -> None:
        end = super().finalize
        self.attempt(lambda: end(status))


def _settings(wandb: Any) -> Any:
    """Return settings that bound the time of opening and closing a run, unless the user's do."""
    bounds = {"init_timeout": _INIT_SECONDS, "finish_timeout": _FINISH_SECONDS}
    known = getattr(wandb.Settings, "model_fields", {})
    own = {
        name: value
        for name, value in bounds.items()
        if name in known and f"WANDB_{name.upper()}" not in os.environ
    }
    return wandb.Settings(**own)


def _say(text: str) -> None:
    logging.getLogger("lightning.pytorch").warning("W&B: %s", text)


def unreachable(base_url: str, key: str | None, seconds: float = _SECONDS) -> str:
    """Return why a server cannot be logged to, or an empty string.

    Args:
        base_url: its address.
        key: the user's key, if it is known; else that of the netrc file.
        seconds: time in which it must answer, whatever it is that takes long.
    """
    place = urlsplit(base_url).hostname or base_url
    key = key or key_of(place)
    if key is None and not os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return f"there is no key for {place}"
    answers: list[str] = []
    asking = threading.Thread(target=lambda: answers.append(_ask(base_url, key)), daemon=True)
    asking.start()
    asking.join(seconds)
    if not answers:
        return f"{place} does not answer within {seconds:g} s"
    return f"{place} {answers[0]}" if answers[0] else ""


def _ask(base_url: str, key: str | None) -> str:
    """Ask a server who the user is, and return what is wrong with it, or an empty string."""
    content = json.dumps({"query": "query Viewer { viewer { id } }"}).encode()
    headers = {"Content-Type": "application/json"}
    if key is not None:
        headers["Authorization"] = "Basic " + base64.b64encode(f"api:{key}".encode()).decode()
    try:
        asked = urllib.request.Request(f"{base_url.rstrip('/')}/graphql", content, headers)
        with urllib.request.urlopen(asked, timeout=_SECONDS):
            return ""
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return "rejects the key"
        return f"answers with status {error.code}" if error.code >= 404 else ""
    except urllib.error.URLError as error:
        # a server whose certificate only the client knows may be right
        if "CERTIFICATE" in str(error.reason):
            return ""
        return f"cannot be reached ({error.reason})"
    except Exception as error:  # an address that is none, an answer that is not HTTP
        return f"cannot be reached ({cause(error)})"


def key_of(host: str) -> str | None:
    """Return the key for a host from the environment or the netrc file, if there is one."""
    key = os.environ.get("WANDB_API_KEY")
    if key:
        return key
    path = os.path.expanduser(os.environ.get("NETRC", "~/.netrc"))
    try:
        known = netrc.netrc(path)
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
        return None
    found = known.authenticators(host)
    if found is None and host.endswith(_HOSTED):
        found = known.authenticators("api.wandb.ai")
    return found[2] if found else None
