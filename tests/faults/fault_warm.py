"""Everything that commands import, loaded once in the server that processes are forked from."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["WANDB_MODE"] = "disabled"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

for name in (
    "datasets",
    "lightning.pytorch",
    "PIL.Image",
    "torchmetrics",
    "transformers.models.auto.modeling_auto",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
    "transformers.models.vit.modeling_vit",
    "transformers.models.vit.image_processing_vit",
    "gradmerge.cli.main",
    "gradmerge.cli.fit",
    "gradmerge.cli.commands",
    "gradmerge.training",
    "gradmerge.drivers",
    "gradmerge.alignment",
    "gradmerge.mergekit",
    "fault_runner",
):
    with contextlib.suppress(ImportError), warnings.catch_warnings():
        importlib.import_module(name)

# Collections in a forked process would touch, and so copy, all of these objects.
gc.collect()
gc.freeze()
