"""REPAIR's corrections: channels of the sources and of the merged network, layer after layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gradmerge.alignment.views import original_of
from gradmerge.calibration.repair.layers import Layer, Run, channel_axis, survey_of
from gradmerge.calibration.repair.measure import (
    Channels,
    after_call,
    before_call,
    called_again,
    called_once,
    channels_of,
    output_channels,
    take_batch,
    watch,
)
from gradmerge.engine.autograd import checksums
from gradmerge.engine.buffers import Moments
from gradmerge.engine.merged import MergedModel
from gradmerge.errors import ConfigError
from gradmerge.finalisers import REPAIR, Correction
from gradmerge.finalisers.repair import correction_of


class Renormalisation:
    """REPAIR of one merged model on given passes, for any coefficients.

    Layers and targets do not depend on coefficients, so they are found once.

    Args:
        merged: the merged model.
        repair: what is to be done.
        runs: forward passes through `merged`; all their rows count alike. They are not kept.
    """

    def __init__(self, merged: MergedModel, repair: REPAIR, runs: Sequence[Run]) -> None:
        if not runs:
            raise ConfigError("REPAIR: expected passes over adaptation data, got none.")
        self._merged, self._repair = merged, repair
        # A view that mixes units computes something else than its source: its channels vary less
        # from layer to layer. Targets are those of the others, the first or the reference at least.
        opened = merged.plan.sources
        self._unmixed = [name for name in opened if original_of(opened[name]) is opened[name]]
        with torch.inference_mode(False), torch.no_grad():
            with merged.as_source(self._unmixed[0]):
                self.survey = survey_of(merged, repair, runs)
            self._own: dict[str, Channels] = {}
            for source in self._unmixed:
                with merged.as_source(source):
                    own, calls = output_channels(self.survey.layers, runs, whole=True, once=False)
                self._own[source] = own
                for layer in self.survey.layers:
                    count = calls[layer.place]
                    if count > 1:
                        why = f"source {source} calls it {count} times a pass"
                        self.survey.leave(layer, why, count)
            self._require_layers()

    def _require_layers(self) -> None:
        if not self.survey.layers:
            reasons = "; ".join(f"{name}: {why}" for name, why in self.survey.left.items())
            raise ConfigError(
                "REPAIR: found no layer to correct: it takes linear layers, convolutions and "
                f"BatchNorm before the network's outputs ({reasons or 'there are none'}). Leave "
                "it out of `finalisers`."
            )

    def targets(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Mean and deviation that a layer's channels shall have, `[channels]`, float64.

        Raises:
            ConfigError: the coefficients say no mean of the sources.
        """
        assert layer.weight is not None
        means, deviations = zip(*(own[layer.weight] for own in self._own.values()), strict=True)
        weights = torch.full((len(means), 1), 1 / len(means), dtype=torch.float64)
        if self._repair.interpolate == "coefficients":
            plan = self._merged.plan
            found = plan.coefficient(layer.weight, self._merged.raw).detach().double().cpu()
            found = found.reshape(len(found), -1).mean(dim=1, keepdim=True)
            found = found[[list(plan.sources).index(source) for source in self._unmixed]]
            if not (found >= 0).all() or found.sum() == 0:
                raise ConfigError(
                    f"REPAIR: interpolate: coefficients wants some above zero and none below, got "
                    f"{[round(c, 4) for c in found.flatten().tolist()]} at {layer.weight}; take "
                    "interpolate: mean."
                )
            weights = found / found.sum()
        return (weights * torch.stack(means)).sum(0), (weights * torch.stack(deviations)).sum(0)

    @torch.no_grad()
    def correct(self, runs: Sequence[Run]) -> None:
        """Compute the corrections for the coefficients as they stand, and give them to the plan.

        BatchNorm statistics are recomputed on the way, where the recipe says so. A single run takes
        a single pass, whose outputs are corrected on the fly.

        Args:
            runs: the same passes again.
        """
        merged, finalisation = self._merged, self._merged.plan.finalisation
        corrections: dict[str, Correction] = {}
        report: dict[str, Any] = {
            "corrected": [],
            "scale alone": [],
            "left alone": dict(self.survey.left),
            "constant channels": {},
        }
        layers = [layer for stage in self.survey.stages for layer in stage]
        at_once = len(runs) == 1 and all(layer.calls == 1 for layer in layers)
        weights = _Weights(merged, {} if at_once else corrections)
        with (
            torch.inference_mode(False),
            merged.statistics.evaluating(),
            merged.as_weights(weights.read),
        ):
            if at_once:
                self._in_one_pass(layers, runs[0], corrections, report)
            before: list[Layer] = []
            for stage in () if at_once else self.survey.stages:
                for layer, (mean, deviation) in self._measure(stage, before, runs):
                    self._fold(layer, mean, deviation, corrections, report)
                    weights.changed(layer)
                before += stage
        for layer in layers:
            if layer.weight is not None and layer.weight not in corrections:
                why = "no row of the data reaches it in the merged network"
                report["left alone"].setdefault(layer.weight, why)
        report = {key: value for key, value in report.items() if value}
        if len(self._unmixed) < len(merged.plan.sources):
            report["targets of"] = list(self._unmixed)
        own = checksums(merged.raw.values())
        finalisation.correct(corrections, {"batches": len(runs), **report}, own)

    def _fold(
        self,
        layer: Layer,
        mean: Tensor,
        deviation: Tensor,
        corrections: dict[str, Correction],
        report: dict[str, Any],
    ) -> None:
        assert layer.weight is not None
        if any(layer.weight not in own for own in self._own.values()):
            report["left alone"][layer.weight] = "no row of the data reaches it in some source"
            return
        for what, values in (
            ("merged network", (mean, deviation)),
            ("sources", self.targets(layer)),
        ):
            if not all(value.isfinite().all() for value in values):
                raise ConfigError(
                    f"REPAIR: {layer.weight}: the outputs of the {what} are not all finite on the "
                    "data, so that they have no mean. Look for NaN or infinite weights and inputs."
                )
        scale, shift, constant = correction_of(mean, deviation, *self.targets(layer))
        corrections[layer.weight] = Correction(scale, None, layer.axis, layer.groups)
        if layer.bias is not None:
            corrections[layer.bias] = Correction(scale, shift)
        report["scale alone" if layer.bias is None else "corrected"].append(layer.weight)
        if constant:
            report["constant channels"][layer.weight] = constant

    def _in_one_pass(
        self,
        layers: Sequence[Layer],
        run: Run,
        corrections: dict[str, Correction],
        report: dict[str, Any],
    ) -> None:
        """Every layer measured when it is called, and its output corrected for those behind it."""
        called: set[str] = set()

        def take(layer: Layer, moments: Moments, batch: Tensor) -> None:
            moments.take(batch)
            if self._recomputes:
                moments.write(layer.module)  # type: ignore[arg-type]

        def correct(layer: Layer, moments: Moments, output: Tensor) -> Tensor:
            if layer.place in called:
                raise called_again(layer)
            called.add(layer.place)
            if not layer.is_norm:
                moments.take(channels_of(layer, output, run.mask))
            if layer.weight is not None and moments.rows:
                channels = moments.mean, moments.deviation
                found = _normalised(layer, moments) if layer.is_norm else channels
                self._fold(layer, *found, corrections, report)
                output = _on_the_fly(layer, output, corrections)
            return output

        hooks = []
        for layer in layers:
            moments = Moments()
            if layer.is_norm:
                hooks.append(before_call(layer.module, partial(take, layer, moments)))
            hooks.append(after_call(layer.module, partial(correct, layer, moments)))
        try:
            run.call()
        finally:
            for hook in hooks:
                hook.remove()

    @property
    def _recomputes(self) -> bool:
        return self._merged.plan.recipe.buffers == "recompute"

    def _measure(
        self, stage: Sequence[Layer], before: Sequence[Layer], runs: Sequence[Run]
    ) -> Iterator[tuple[Layer, tuple[Tensor, Tensor]]]:
        """Channels of a stage, as far as rows reach it; a BatchNorm's own statistics come first."""
        whole = stage is self.survey.stages[-1]  # which sees whether a layer is called again
        with called_once(before, runs) as counted:
            yield from self._measured(stage, counted, whole)

    def _measured(
        self, stage: Sequence[Layer], runs: Sequence[Run], whole: bool
    ) -> Iterator[tuple[Layer, tuple[Tensor, Tensor]]]:
        linear = [layer for layer in stage if not layer.is_norm]
        found, _ = output_channels(linear, runs, whole)
        yield from ((layer, found[n]) for layer in linear if (n := str(layer.weight)) in found)
        for layer in stage:
            if not layer.is_norm:
                continue
            if layer.calls > 1:
                if self._recomputes:
                    calls = [run.call for run in runs]
                    self._merged.statistics.recompute(calls, [layer.module])
                continue
            moments = Moments()
            watch([layer], runs, partial(take_batch, moments), before_call, whole)
            if self._recomputes:
                moments.write(layer.module)  # type: ignore[arg-type]
            if layer.weight is not None and moments.rows:
                yield layer, _normalised(layer, moments)


class _Weights:
    """The merged network as far as it is corrected: what finalisers before REPAIR left, corrected.

    In resident memory all tensors are kept, in streamed memory each is built when its layer asks.
    """

    def __init__(self, merged: MergedModel, corrections: Mapping[str, Correction]) -> None:
        self._merged, self._corrections = merged, corrections
        self._kept: dict[str, Tensor] = {}

    def read(self, name: str) -> Tensor | None:
        """A tensor in the dtype of the computation; None for a private one."""
        plan = self._merged.plan
        if name not in plan.tensors:
            return None
        if name in self._kept:
            return self._kept[name]
        dtype = torch.promote_types(self._merged.dtype, torch.float32)
        raw = None if name in plan.fixed else plan.raw(name, self._merged.raw).detach()
        theta = plan.finalisation.before_repair(name, self._merged.build(name, raw, dtype))
        if name in self._corrections:
            theta = self._corrections[name](theta)
        theta = theta.to(self._merged.dtype)
        if self._merged.memory == "resident":
            self._kept[name] = theta
        return theta

    def changed(self, layer: Layer) -> None:
        """Build a layer's tensors anew."""
        for name in (layer.weight, layer.bias):
            self._kept.pop(str(name), None)


def _on_the_fly(layer: Layer, output: Tensor, corrections: Mapping[str, Correction]) -> Tensor:
    """What a layer puts out once its weights are corrected."""
    found = corrections.get(str(layer.weight))
    if found is None:
        return output
    scale, shift = found.scale, torch.zeros_like(found.scale)
    kept: Tensor | None = getattr(layer.module, "bias", None)
    if layer.bias is not None:
        shift = corrections[layer.bias].shift  # type: ignore[assignment]
    elif kept is not None:  # frozen: it is not scaled with the weight
        shift = (1 - scale) * kept.detach().cpu().double()
    return Correction(scale, shift, channel_axis(layer.module, output))(output)


def _normalised(layer: Layer, moments: Moments) -> tuple[Tensor, Tensor]:
    """Mean and deviation of a BatchNorm's outputs from those of its inputs."""
    module: Any = layer.module
    gain, bias = (value.detach().cpu().double() for value in (module.weight, module.bias))
    mean, variance = (b.cpu().double() for b in (module.running_mean, module.running_var))
    slope = gain / (variance + module.eps).sqrt()
    return bias + slope * (moments.mean - mean), slope.abs() * moments.deviation
