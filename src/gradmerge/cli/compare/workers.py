"""Processes that run the methods of a comparison, each on its own share of the cores."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

from gradmerge.cli.compare.baselines import BASELINES, Baselines
from gradmerge.cli.compare.bench import Bench
from gradmerge.cli.compare.work import MissingError, Say, Work
from gradmerge.common.errors import GradmergeError

Ended = tuple[Work, "list[str] | None", str]
"""A finished method: the names of its records, or None and why it has failed."""


def run_work(work: Work, say: Say, known_only: bool = False) -> list[str]:
    """Run a method on its seed, and return the names of its final records."""
    kind = Baselines if work.method.name == BASELINES.name else Bench
    return kind(work, say, known_only).run()


def known(work: Work) -> list[str] | None:
    """Return the names of the final records of a method that has finished before, else None."""
    try:
        return run_work(work, lambda *_: None, known_only=True)
    except (MissingError, GradmergeError):
        return None


def attempt(work: Work, say: Say) -> tuple[list[str] | None, str]:
    """Run a method, and return its records, or None and why it has failed."""
    try:
        return run_work(work, say), ""
    except GradmergeError as error:
        return None, str(error)
    except MemoryError:
        return None, "out of memory"
    except Exception as error:
        traceback.print_exc()
        return None, f"{type(error).__name__}: {error}"


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    work: Work | None = None


def run_in_processes(
    works: Sequence[Work], count: int, say: Callable[[Work, str, float], None]
) -> Iterator[Ended]:
    """Yield methods as they finish, run in processes of their own that are used again.

    A process that dies (out of memory) fails its own method only.

    Args:
        works: what is to be done.
        count: number of processes.
        say: called after each trial.
    """
    waiting = list(works)
    workers: list[_Worker] = []
    threads = max(1, (os.cpu_count() or 1) // count)
    is_done = False
    try:
        while waiting or any(worker.work for worker in workers):
            while waiting and len([w for w in workers if w.work]) < count:
                idle = next((w for w in workers if not w.work), None)
                worker = idle or _start(threads)
                if idle is None:
                    workers.append(worker)
                worker.work = waiting.pop(0)
                with suppress(OSError):  # a process that has died is found below
                    worker.pipe.send(worker.work)
            pipes: dict[Any, _Worker] = {worker.pipe: worker for worker in workers if worker.work}
            for pipe in wait(list(pipes)):
                worker = pipes[pipe]
                assert worker.work is not None
                try:
                    kind, *content = worker.pipe.recv()
                except (EOFError, OSError):
                    worker.process.join()
                    workers.remove(worker)
                    code = worker.process.exitcode
                    yield (
                        worker.work,
                        None,
                        f"its process has died (status {code}); was memory short?",
                    )
                    continue
                if kind == "trial":
                    say(worker.work, *content)
                else:
                    done, worker.work = worker.work, None
                    yield done, content[0], content[1]
        is_done = True
    finally:
        for worker in workers:
            worker.pipe.close()  # which ends it, unless it is at work
            if not is_done:
                worker.process.terminate()
        for worker in workers:
            worker.process.join(10)
            if worker.process.is_alive():
                worker.process.kill()


def _start(threads: int) -> _Worker:
    context = get_context("spawn")  # torch's threads do not survive a fork
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, threads, os.getpid()))
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _serve(pipe: Connection, threads: int, parent: int) -> None:
    """Run what the pipe brings until it is closed."""
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()

    def say(text: str, seconds: float) -> None:
        try:
            pipe.send(("trial", text, seconds))
        except OSError:  # the command has died; its records are on disk
            os._exit(1)

    with prepared(threads), suppress(EOFError, OSError, KeyboardInterrupt):
        while True:
            names, reason = attempt(pipe.recv(), say)
            sys.stdout.flush()
            pipe.send(("end", names, reason))


@contextmanager
def prepared(threads: int | None = None) -> Iterator[None]:
    """Run methods in this process: with a number of threads, and silent on what is not asked for.

    What is silenced speaks again after the context, in which a program may go on.
    """
    import logging
    import warnings

    import datasets
    import lightning  # noqa: F401  its import sets the levels of its logs
    import torch

    from gradmerge.cli.learning import quieten

    if threads is not None:
        torch.set_num_threads(min(threads, torch.get_num_threads()))
    logs = {name: logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")}
    levels = {name: log.level for name, log in logs.items()}
    shows_bars = datasets.is_progress_bar_enabled()
    with warnings.catch_warnings():
        quieten()
        warnings.filterwarnings("ignore", ".*args parameter is intended to run from within.*")
        datasets.disable_progress_bars()
        try:
            for log in logs.values():
                log.setLevel(logging.ERROR)
            yield
        finally:
            for name, log in logs.items():
                log.setLevel(levels[name])
            if shows_bars:
                datasets.enable_progress_bars()


def _follow(parent: int) -> None:
    """End this process with the one that started it, which may be killed."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
