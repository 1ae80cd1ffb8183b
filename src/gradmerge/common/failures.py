"""Failures of files, options and machines, told apart from faults of gradmerge itself.

Other libraries raise almost any exception on a file or an option that they do not understand.
`reading` turns them into gradmerge's errors where the file is known, and `expected` names those
that can happen anywhere. An exception that neither knows is a fault of gradmerge.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gradmerge.common.errors import GradmergeError, SourceError

# Libraries that check what the user asked for themselves: what one of them raises in its own code,
# by the folder of the code, is about an option.
_CHECKED = {
    "lightning/pytorch": "trainer",
    "lightning/fabric": "trainer",
    "torch/optim": "optimizer",
}
_LONGEST = 400
# Classes of exceptions whose name adds nothing to a message.
_PLAIN = (
    "ValueError",
    "RuntimeError",
    "ArrowInvalid",
    "JSONDecodeError",
    "MisconfigurationException",
)


@contextmanager
def reading(
    where: object, what: str, todo: str = "", kind: type[GradmergeError] = SourceError
) -> Iterator[None]:
    """Turn any exception of another library into an error that names a file or an option.

    gradmerge's own errors, and those of memory, pass.

    Args:
        where: file, folder or option.
        what: what was tried, e.g. ``transformers cannot read its config``.
        todo: what the user can do.
        kind: class of the error.
    """
    try:
        yield
    except GradmergeError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise kind(f"{where}: {what}: {cause(error)}. {todo}".rstrip()) from error


def cause(error: BaseException) -> str:
    """Return an exception on one line: its class, if that says something, and its message."""
    text = " ".join(str(error).split()).rstrip(".")
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST].rstrip()} ..."
    name = type(error).__name__
    if len(text.split()) > 2 and (name in _PLAIN or isinstance(error, OSError)):
        return text
    return f"{name}: {text}" if text else name


def expected(error: BaseException) -> str | None:
    """Return the message of a failure that is not gradmerge's fault, or None."""
    if isinstance(error, GradmergeError):
        return str(error)
    if is_out_of_memory(error):
        return (
            f"not enough memory: {cause(error)}.\nUse a smaller data.batch_size, model.memory: "
            "streamed with activation_checkpointing, or fewer sources at a time (a driver: Pairwise"
            ", LayerWise)."
        )
    if isinstance(error, OSError):
        return _of_system(error)
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        if package != "gradmerge":
            return f"{package} is not installed, and an option needs it: {cause(error)}."
    file = Path(raised_in(error)).as_posix()
    if isinstance(error, ValueError) and "/transformers/models/" in file:
        return (
            f"the network refuses its inputs: {cause(error)}.\nThe data, or the tokenizer or image "
            "processor (data.processor), do not belong to these models."
        )
    for folder, option in _CHECKED.items():
        if f"/{folder}/" in file:
            return f"{option}: {cause(error)}."
    return None


def raised_in(error: BaseException) -> str:
    """Return the file of the code that raised an exception, or an empty string."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else trace.tb_frame.f_code.co_filename


def is_out_of_memory(error: BaseException) -> bool:
    """Return True for an error of the machine's memory or an accelerator's."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    # torch's class for accelerators; on a CPU it raises RuntimeError
    if type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error)
    signs = "can't allocate memory", "out of memory", "Cannot allocate memory"
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)


def _of_system(error: OSError) -> str:
    """Return the message of the operating system with the paths that it concerns."""
    paths = [
        os.fsdecode(p) for p in (error.filename, error.filename2) if isinstance(p, str | bytes)
    ]
    if not paths or error.strerror is None:
        return f"{cause(error)}."
    hints = {
        errno.ENOSPC: " Free some space, or write to another disk.",
        errno.EDQUOT: " Free some space, or write to another disk.",
        errno.EACCES: " Check its permissions, or choose another path.",
        errno.EPERM: " Check its permissions, or choose another path.",
        errno.EROFS: " Choose another path.",
        errno.ENAMETOOLONG: " Choose a shorter path.",
        errno.EMFILE: " Raise the limit of open files (ulimit -n).",
    }
    return f"{' -> '.join(paths)}: {error.strerror}.{hints.get(error.errno or 0, '')}"
