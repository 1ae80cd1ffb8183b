"""Forward passes in step: each merged tensor is made once and read by all of them.

The passes of several tasks read the same weights in the same order. Each pass has a thread, of
which one runs at a time: it stops where it reads a merged tensor, until all others have come to
their next one. The tensor that the pass furthest behind waits for is then made and handed to every
pass that waits for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack
from contextvars import copy_context

import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from gradmerge.common.errors import ConfigError


def require_at_once(count: int, memory: str) -> None:
    """Reject a number of tasks at once that does not suit a memory mode.

    Raises:
        ConfigError: it is below 1, or above 1 in resident memory.
    """
    if count < 1 or (count > 1 and memory != "streamed"):
        raise ConfigError(
            f"tasks_at_once: expected 1, or more with memory: streamed, got {count} with {memory}."
            " Resident memory merges once for all tasks."
        )


class _Ended(BaseException):
    """Ends a pass because another one has failed."""


class _Pass:
    """A forward pass in a thread, and the tensor that it waits for."""

    def __init__(self, run: Callable[[], Tensor], settings: Callable[[], ExitStack]) -> None:
        self.name: Hashable = None
        self.make: Callable[[], Tensor] | None = None
        self.reads = 0
        self.loss: Tensor | None = None
        self.error: BaseException | None = None
        self._theta: Tensor | None = None
        self._ends = False
        self._turn, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        # with the caller's context variables
        start = (self._run, run, settings)
        self.thread = threading.Thread(target=copy_context().run, args=start, daemon=True)

    def _run(self, run: Callable[[], Tensor], settings: Callable[[], ExitStack]) -> None:
        self._turn.acquire()
        try:
            if not self._ends:
                with settings():
                    self.loss = run()
        except _Ended:
            pass
        except BaseException as error:
            self.error = error
        finally:
            self._stopped.release()

    def start(self) -> None:
        """Run to the first merged tensor."""
        self.thread.start()
        self._go()

    def read(self, name: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """Wait for a merged tensor; called by the pass itself."""
        self.name, self.make = name, make
        self._stopped.release()
        self._turn.acquire()
        if self._ends:
            raise _Ended
        theta, self._theta = self._theta, None
        assert theta is not None
        return theta

    def resume(self, theta: Tensor) -> None:
        """Hand the tensor over, and run to the next one, or to the end."""
        self._theta, self.make = theta, None
        self.reads += 1
        del theta
        self._go()

    def end(self) -> None:
        """End the thread."""
        self._ends = True
        if self.thread.ident is not None:
            self._turn.release()
            self.thread.join()

    def _go(self) -> None:
        self._turn.release()
        self._stopped.acquire()
        if self.error is not None:
            raise self.error


class Together:
    """The passes that run together, if any do."""

    def __init__(self) -> None:
        self._passes: list[_Pass] = []

    def __reduce__(self) -> tuple[type[Together], tuple[()]]:
        """Copy as one without passes."""
        return Together, ()

    def current(self) -> _Pass | None:
        """Return the pass whose thread calls."""
        here = threading.current_thread()
        return next((one for one in self._passes if one.thread is here), None)

    def losses(self, runs: Sequence[Callable[[], Tensor]], device: torch.device) -> list[Tensor]:
        """Run forward passes in step, and return their losses with their graphs.

        Merged tensors are made in the calling thread. What torch keeps per thread (autocast, modes,
        the stream) is that of the caller.

        Args:
            runs: the passes.
            device: where they run.
        """
        self._passes = [_Pass(run, _settings(device)) for run in runs]
        try:
            for one in self._passes:
                one.start()
            while True:
                waiting = [one for one in self._passes if one.make is not None]
                if not waiting:
                    break
                first = min(waiting, key=lambda one: one.reads)
                assert first.make is not None
                theta = [put_first(first.make())]
                alike = [one for one in waiting if one.name == first.name]
                for number, one in enumerate(alike, 1):
                    # the last pass alone holds it, so that it is freed as soon as that goes on
                    one.resume(theta[0] if number < len(alike) else theta.pop())
            return [one.loss for one in self._passes if one.loss is not None]
        finally:
            for one in self._passes:
                one.end()
            self._passes = []


def _settings(device: torch.device) -> Callable[[], ExitStack]:
    """Return a function that gives another thread the settings which torch keeps per thread."""
    kinds = dict.fromkeys((device.type, "cpu"))
    casts = [(k, torch.get_autocast_dtype(k), torch.is_autocast_enabled(k)) for k in kinds]
    cached = torch.is_autocast_cache_enabled()
    modes = [*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()]
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def enter() -> ExitStack:
        stack = ExitStack()
        if stream is not None:
            stack.enter_context(torch.cuda.stream(stream))  # and its device
        for kind, dtype, enabled in casts:
            stack.enter_context(torch.autocast(kind, dtype, enabled, cached))
        for mode in modes:
            stack.enter_context(mode)
        stack.enter_context(torch.enable_grad())
        return stack

    return enter


def put_first(theta: Tensor) -> Tensor:
    """Return a tensor whose node runs as soon as all its gradients have arrived.

    Nodes run in the reverse order of their making, which is counted by thread. One made in the
    calling thread, between the passes, would otherwise hold its gradient until the end.
    """
    if theta.grad_fn is not None:
        theta.grad_fn._set_sequence_nr(2**62)  # type: ignore[attr-defined]
    return theta
