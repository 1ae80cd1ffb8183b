"""A model of lm-evaluation-harness: a merge that is not exported.

`import gradmerge.training.harness_model` registers it there as `gradmerge`. Only this module needs
lm-eval to be imported.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from typing_extensions import override

from gradmerge.common.errors import ConfigError, nearest
from gradmerge.engine.merged import MergedModel
from gradmerge.engine.plan import Plan
from gradmerge.export.folder import DTYPES
from gradmerge.training.generation import stated_generation
from gradmerge.training.harness import require_language_model
from gradmerge.training.module import MergeModule


class _Network:
    """The merged network as lm-eval calls it: no module whose placeholders it would tie."""

    def __init__(self, merged: MergedModel) -> None:
        self._merged = merged
        self._generation = stated_generation(merged.skeleton, merged.plan.folder)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._merged.skeleton, name)

    @property
    def device(self) -> torch.device:
        return self._merged.device

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._merged.run(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        network: Any = self._merged.skeleton
        return network.generate(*args, generation_config=self._generation, **kwargs)


@register_model("gradmerge")
class MergedLM(HFLM):  # type: ignore[misc]
    """The merge of a fit's checkpoint, or of a `MergedModel`, as a model of lm-eval.

    The network gets its merged weights when lm-eval asks for answers, and no folder is written.
    Scores are those of the folder that `gradmerge export` would write, opened by lm-eval's `hf`.

    Args:
        checkpoint: checkpoint of `gradmerge fit`, or a merged model, which is used as it is.
        head: task whose head is used, if heads are private. Default: the first.
        dtype: dtype of the computation. Default: that in which transformers opens the sources.
        device: device. Default: a GPU if there is one.
        trust_remote_code: run modelling code that ships with the sources.
        allow_modules: modules outside gradmerge whose components the checkpoint may use.
        sources: places of sources that have moved, by name.
        quiet: show no progress.
        **options: more arguments of lm-eval's `HFLM`: batch_size, max_length, ...
    """

    def __init__(
        self,
        checkpoint: str | Path | MergedModel,
        head: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        trust_remote_code: bool = False,
        allow_modules: Sequence[str] = (),
        sources: Mapping[str, str] | None = None,
        quiet: bool = False,
        **options: Any,
    ) -> None:
        if isinstance(checkpoint, MergedModel):
            merged = checkpoint
        else:
            module = MergeModule.load_from_checkpoint(
                checkpoint,
                allow_modules=allow_modules,
                trust_remote_code=trust_remote_code,
                sources=sources,
            )
            merged = module.eval().merged
            device = device or ("cuda" if torch.cuda.is_available() else "cpu")
            merged.to(device=device, dtype=DTYPES[dtype] if dtype else stored_dtype(merged.plan))
        require_language_model(type(merged.skeleton).__name__, "the merge")
        if head is not None and head not in merged.tasks:
            raise ConfigError(
                f"head: unknown task {head!r} (choose from {', '.join(merged.tasks)})."
                f"{nearest(head, merged.tasks)}"
            )
        self.merged, self.head, self.quiet = merged, head or next(iter(merged.tasks)), quiet
        folder = merged.plan.reference.tokenizer_folder or merged.plan.folder
        if folder is None:
            raise ConfigError(
                "the merge: expected sources with a tokenizer, got none; lm-evaluation-harness "
                "asks in text. Save the tokenizer in the folder of the base or of a source."
            )
        log = logging.getLogger("lm_eval.models.huggingface")
        before = log.level
        log.setLevel(logging.ERROR)  # it advises against networks that are built already
        try:
            super().__init__(
                _Network(merged),
                tokenizer=str(folder),
                trust_remote_code=merged.plan.recipe.trust_remote_code,
                **options,
            )
        finally:
            log.setLevel(before)

    @contextmanager
    def _with_weights(self) -> Iterator[None]:
        with torch.no_grad(), self.merged.prepared(self.head):
            yield

    @override
    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        with self._with_weights():
            return super().loglikelihood(requests, disable_tqdm or self.quiet)

    @override
    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        with self._with_weights():
            return super().loglikelihood_rolling(requests, disable_tqdm or self.quiet)

    @override
    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        with self._with_weights():
            return super().generate_until(requests, disable_tqdm or self.quiet)


def stored_dtype(plan: Plan) -> torch.dtype:
    """Return the dtype in which transformers opens an export of a merge (`dtype="auto"`)."""
    config = plan.reference.config or {}
    stated = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    if stated in DTYPES:
        return DTYPES[stated]
    kinds = (info.dtype for info in plan.reference.infos.values())
    return next((kind for kind in kinds if kind.is_floating_point), torch.float32)
