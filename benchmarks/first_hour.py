"""The first hour of a new user: three LoRA adapters become one model, and ten mistakes on the way.

    python benchmarks/first_hour.py [--parts learn memory mistakes] [--json first-hour.json]

The adapters, their base and their data are those of the chat suite (benchmarks/suites/chat.py),
which is built or found in the cache. Prints Markdown:

* the commands, with the CPU seconds of `gradmerge learn` before its first step and in all;
* the highest anonymous memory (RssAnon) of that process, in all and during steps, over that of a
  process that loads the base alone with transformers and takes forward and backward of the same
  batches in the same dtype (imports included in all of them);
* mistakes, each with the CPU seconds of the command (children included) and its whole message.

Threads are as the environment says. `--install` also installs gradmerge into a fresh environment.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

import harness

TASKS = ("news", "reviews", "tweets")
RUN = "import sys; from gradmerge.cli import main; sys.exit(main())"
PARTS = ("learn", "memory", "mistakes")


def prepare(folder: Path, suite: Path) -> None:
    """Lay out a user's folder: the base, an adapter per task, and one file of chats for each."""
    (folder / "base").symlink_to(suite / "base")
    for task in TASKS:
        (folder / task).symlink_to(suite / "experts" / task)
        parts = [suite / "data" / task / f"{name}.jsonl" for name in ("adaptation", "selection")]
        text = "".join(part.read_text(encoding="utf-8") for part in parts)
        (folder / f"{task}.jsonl").write_text(text, encoding="utf-8")


def learn(*more: str, base: str = "base", data: dict[str, str] | None = None) -> list[str]:
    """Return the arguments of the command that the README begins with."""
    places = {task: f"{task}.jsonl" for task in TASKS} | (data or {})
    given = [part for task, place in places.items() for part in ("--data", f"{task}={place}")]
    return ["learn", *TASKS, "--base", base, *given, *more]


# ---- the learned merge, and plain forward and backward -------------------------------------------


def learned(folder: Path, arguments: list[str]) -> dict[str, Any]:
    """Run a command in this process, and note when its first step begins and what steps take."""
    os.chdir(folder)
    import torch

    from gradmerge.cli.main import main
    from gradmerge.training.module import MergeModule

    found: dict[str, Any] = {"threads": torch.get_num_threads()}
    step = MergeModule.training_step
    during: dict[str, float] = {}

    def noted(self: Any, batch: Any, batch_idx: int) -> Any:
        taken = self.trainer.global_step
        if "before" not in found:
            found["before"], found["dtype"] = time.process_time(), str(self.merged.dtype)
            found["before, clock"] = time.perf_counter() - began
        torch.save(batch, f"batch{taken}.pt")
        with harness.measured(during):
            loss = step(self, batch, batch_idx)
        found["step, peak"] = max(found.get("step, peak", 0.0), during["peak"])
        found["step, cpu"] = found.get("step, cpu", 0.0) + during["cpu"]
        return loss

    MergeModule.training_step = noted  # type: ignore[method-assign]
    whole: dict[str, float] = {}
    began = time.perf_counter()
    with harness.measured(whole):
        status = main(arguments)
    if status:
        raise SystemExit(f"gradmerge {' '.join(arguments)} ended with status {status}")
    return {**found, "peak": whole["peak"], "cpu": time.process_time(), "clock": whole["wall"]}


def plain(folder: Path, dtype: str) -> dict[str, Any]:
    """Take forward and backward of the base on the same batches, by transformers alone."""
    import torch
    from transformers import AutoModelForCausalLM

    from gradmerge.common.memory import release_freed_memory

    release_freed_memory()  # as gradmerge does
    kind = getattr(torch, dtype.removeprefix("torch."))
    network = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=kind)
    found: dict[str, float] = {}
    took: list[float] = []
    with harness.measured(found):
        for path in folder.glob("batch*.pt"):
            batches = torch.load(path, weights_only=True)
            start = time.process_time()
            for batch in batches.values():
                network(**batch).loss.backward()
            network.zero_grad(set_to_none=True)
            took.append(time.process_time() - start)
    return {"peak": found["peak"], "cpu": sum(took)}


# ---- mistakes -----------------------------------------------------------------------------------


def mistakes(folder: Path) -> dict[str, list[str]]:
    """Return commands by what is wrong with them; files that they need are written."""
    untold = folder / "base-without-template"
    untold.mkdir()
    for path in (folder / "base").iterdir():
        if path.name != "chat_template.jinja":
            (untold / path.name).symlink_to(path.resolve())
    smaller(folder / "base", folder / "smaller-model")
    plain_rows = [{"headline": f"headline {i}", "section": "sports"} for i in range(32)]
    (folder / "headlines.jsonl").write_text("\n".join(map(json.dumps, plain_rows)))
    broken = (folder / "news.jsonl").read_text(encoding="utf-8").splitlines()
    (folder / "broken.jsonl").write_text("\n".join([*broken[:7], broken[7][:90], *broken[8:]]))
    config = yaml.safe_load((folder / "merged.yaml").read_text())
    fits = {}
    for name, change in EDITS.items():
        edited = json.loads(json.dumps(config))
        change(edited)
        path = folder / f"{name.replace(' ', '-')}.yaml"
        path.write_text(yaml.safe_dump(edited, sort_keys=False))
        fits[name] = ["fit", "--config", path.name]
    absent = ["learn", "news", "review", "tweets", *learn(base="bases")[4:]]
    absent = [word.replace("reviews", "review") for word in absent]
    found = {
        "a misspelt option": learn("--max_lenght", "128"),
        "a misspelt kind": learn("--kind", "news=chatt"),
        "folders and a file that do not exist": absent,
        "an adapter as the base": learn(base="news"),
        "a base of another size": learn(base="smaller-model"),
        "a base without a chat template": learn(base="base-without-template"),
        "a file without conversations": learn(data={"news": "headlines.jsonl"}),
        "a file that is cut in the middle of a line": learn(data={"news": "broken.jsonl"}),
    }
    found = {name: [*words, "--output", "second"] for name, words in found.items()}
    return {**found, "an output that exists": learn(), **fits}


def misspelt_term(config: dict[str, Any]) -> None:
    config["model"]["objective"]["terms"][0]["class_path"] = "CrossEntrop"


def misspelt_field(config: dict[str, Any]) -> None:
    task = config["data"]["tasks"]["reviews"]
    task["max_lenght"] = task.pop("max_length")


def unknown_source(config: dict[str, Any]) -> None:
    config["data"]["tasks"]["films"] = config["data"]["tasks"].pop("reviews")
    config["data"]["tasks"]["films"]["source"] = "review"


EDITS: dict[str, Callable[[dict[str, Any]], None]] = {
    "a misspelt term in the YAML": misspelt_term,
    "a misspelt field of a task in the YAML": misspelt_field,
    "a task of an unknown source in the YAML": unknown_source,
}


def smaller(base: Path, folder: Path) -> None:
    """Write a narrower network of the same architecture, with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(base)
    config.update({"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 512})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def told(folder: Path, arguments: list[str]) -> tuple[float, str]:
    """Run a command that fails, and return its CPU seconds and what it says on the way."""
    environment = {**os.environ, "PYTHONPATH": str(harness.ROOT / "src"), "WANDB_MODE": "offline"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", RUN, *arguments]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != 2:
        text = f"ended with status {done.returncode}\n{done.stdout}{done.stderr}"
        raise SystemExit(f"{' '.join(arguments)}\n{text[-4000:]}")
    seconds = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return seconds, f"{done.stdout}{done.stderr}".strip().replace(f"{folder}/", "")


# ---- the page -----------------------------------------------------------------------------------


def installed() -> float:
    """Install gradmerge into a fresh environment, and return the seconds that it takes."""
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / "gradmerge"
        skipped = shutil.ignore_patterns(".venv", ".git", ".cache", "outputs")
        shutil.copytree(harness.ROOT, copy, ignore=skipped)
        start = time.perf_counter()
        subprocess.run(["bash", "scripts/install.sh"], cwd=copy, check=True)
        return time.perf_counter() - start


def main() -> None:
    parser = harness.make_parser(__doc__, "suites")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--install", action="store_true", help="time an installation, too")
    parser.add_argument("--steps", type=int, help="of the merge, instead of the default")
    options = parser.parse_args()
    cache = options.cache.resolve()
    harness.build_suite("chat", 0, cache)
    result: dict[str, Any] = {}
    if options.install:
        result["install"] = installed()
        print(f"Installation: {result['install']:.0f} s.\n")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prepare(folder, cache / "chat-seed0")
        command = learn(*(["--steps", str(options.steps)] if options.steps else []))
        print(f"```\ngradmerge {' '.join(command)}\n```\n", flush=True)
        if {"learn", "memory"} & set(options.parts):
            result["learn"] = found = harness.ask(learned, folder, command)
            rows = [
                [
                    "before the first step",
                    f"{found['before']:.1f}",
                    f"{found['before, clock']:.0f}",
                ],
                ["in all", f"{found['cpu']:.0f}", f"{found['clock']:.0f}"],
            ]
            print(f"{found['threads']} threads:\n")
            print(harness.table(["`learn`", "s of CPU", "s of the clock"], rows), "\n", flush=True)
        else:
            told_dry = [*command, "--dry_run", "true"]
            subprocess.run([sys.executable, "-c", RUN, *told_dry], cwd=folder, check=True)
        if "memory" in options.parts:
            result["plain"] = beside = harness.ask(plain, folder, found["dtype"])
            rows = [["plain forward and backward", f"{beside['peak'] / 1e6:.0f}", ""]]
            for name, key in (("`learn`, during steps", "step, peak"), ("`learn`, in all", "peak")):
                cells = [f"{found[key] / 1e6:.0f}", f"{found[key] / beside['peak']:.2f}"]
                rows.append([name, *cells])
            print(harness.table(["peak of anonymous memory", "MB", "ratio"], rows), "\n")
            step = found["step, cpu"] / beside["cpu"]
            print(f"CPU time of a step over plain: {step:.2f} (all steps).\n", flush=True)
        if "mistakes" in options.parts:
            result["mistakes"] = {}
            for name, arguments in mistakes(folder).items():
                seconds, text = told(folder, arguments)
                result["mistakes"][name] = {"seconds": seconds, "message": text}
                print(f"### {name[0].upper()}{name[1:]} ({seconds:.1f} s of CPU)\n")
                print(f"```\n$ gradmerge {' '.join(arguments)}\n{text}\n```\n", flush=True)
    harness.write_json(options.json, result)


if __name__ == "__main__":
    main()
