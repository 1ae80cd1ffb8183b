"""REPAIR's corrections, found layer by layer from channels of the sources and of the merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gradmerge.alignment.views import original_of
from gradmerge.calibration.observers import after_call, before_call, removing
from gradmerge.calibration.repair.layers import Layer
from gradmerge.calibration.repair.measure import called_once, measure
from gradmerge.calibration.repair.survey import Run, survey_of
from gradmerge.engine.autograd import checksums
from gradmerge.engine.buffers import Moments
from gradmerge.engine.merged import MergedModel
from gradmerge.errors import ConfigError
from gradmerge.finalisers import REPAIR, Correction, Corrections
from gradmerge.finalisers.repair import correction_of


class Renormalisation:
    """REPAIR of one merged model on given passes, for any coefficients.

    Layers and targets do not depend on the coefficients, so they are found once.

    Args:
        merged: the merged model.
        repair: the finaliser's options.
        runs: forward passes through `merged`, whose rows all count alike. They are not kept.

    Raises:
        ConfigError: there are no passes, or there is no layer to correct.
    """

    def __init__(self, merged: MergedModel, repair: REPAIR, runs: Sequence[Run]) -> None:
        if not runs:
            raise ConfigError("REPAIR: expected passes over adaptation data, got none.")
        self._merged, self._repair = merged, repair
        # A view that mixes units is another function than its source, whose channels vary less from
        # layer to layer. Targets are those of the others; the reference is always one of them.
        opened = merged.plan.sources
        self._unmixed = [name for name in opened if original_of(opened[name]) is opened[name]]
        with torch.no_grad():
            with merged.as_source(self._unmixed[0]):
                self.survey = survey_of(merged, repair, runs)
            self._own: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
            """Mean and deviation of channels, `[channels]` in float64, by source and weight."""
            for source in self._unmixed:
                self._own[source] = self._channels_of(source, runs)
        if not self.survey.layers:
            reasons = "; ".join(f"{name}: {why}" for name, why in self.survey.left.items())
            raise ConfigError(
                "REPAIR: found no layer to correct: it takes linear layers, convolutions and "
                f"BatchNorm before the network's outputs ({reasons or 'there are none'}). Leave "
                "it out of `finalisers`."
            )

    def _channels_of(self, source: str, runs: Sequence[Run]) -> dict[str, tuple[Tensor, Tensor]]:
        """Measure a source's layers, and leave those alone that it calls several times per pass."""
        layers = self.survey.layers
        with self._merged.as_source(source):
            found = measure(layers, runs, whole=True, norms=after_call)
        for layer in layers:
            if (count := found.calls[layer.place]) > 1:
                self.survey.leave(layer, f"source {source} calls it {count} times a pass", count)
        every = ((layer, found.moments[layer.place]) for layer in layers)
        return {str(layer.weight): (m.mean, m.deviation) for layer, m in every if m.rows}

    def targets(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Return the mean and deviation that a layer's channels get, `[channels]`, float64.

        Raises:
            ConfigError: the coefficients do not define a mean of the sources.
        """
        name = str(layer.weight)
        means, deviations = zip(*(own[name] for own in self._own.values()), strict=True)
        weights = torch.full((len(means), 1), 1 / len(means), dtype=torch.float64)
        if self._repair.interpolate == "coefficients":
            plan = self._merged.plan
            found = self._merged.state.coefficient(name).detach().double().cpu()
            found = found.reshape(len(found), -1).mean(dim=1, keepdim=True)
            found = found[[list(plan.sources).index(source) for source in self._unmixed]]
            if not (found >= 0).all() or found.sum() == 0:
                raise ConfigError(
                    "REPAIR: interpolate: coefficients expects some above zero and none below, got "
                    f"{[round(c, 4) for c in found.flatten().tolist()]} at {name}; take "
                    "interpolate: mean."
                )
            weights = found / found.sum()
        return (weights * torch.stack(means)).sum(0), (weights * torch.stack(deviations)).sum(0)

    @torch.no_grad()
    def correct(self, runs: Sequence[Run]) -> None:
        """Compute the corrections for the current coefficients, and set them in the state.

        BatchNorm statistics are recomputed on the way if the recipe says so. A single run takes a
        single pass, whose outputs are corrected on the fly.

        Args:
            runs: the same passes again.
        """
        merged, stages = self._merged, self.survey.stages
        layers = [layer for stage in stages for layer in stage]
        at_once = len(runs) == 1 and all(layer.calls == 1 for layer in layers)
        self._corrections: dict[str, Correction] = {}
        self._report: dict[str, Any] = {
            "corrected": [],
            "scale alone": [],
            "left alone": dict(self.survey.left),
            "constant channels": {},
        }
        weights = _Weights(merged, {} if at_once else self._corrections)
        with (
            merged.statistics.evaluating(),
            merged.as_weights(weights.read),
            called_once(layers, runs) as passes,
        ):
            if at_once:
                self._correct_on_the_fly(layers, passes[0])
            else:
                self._correct_stages(passes, weights)
        for layer in self.survey.layers:
            if layer.weight not in self._corrections:
                why = "no row of the data reaches it in the merged network"
                self._report["left alone"].setdefault(str(layer.weight), why)
        report = {key: value for key, value in self._report.items() if value}
        if len(self._unmixed) < len(merged.plan.sources):
            report["targets of"] = list(self._unmixed)
        report = {"batches": len(runs), **report}
        own = checksums(merged.raw.values())
        merged.state.corrections = Corrections(self._corrections, report, own)

    def _correct_stages(self, runs: Sequence[Run], weights: _Weights) -> None:
        """Measure each stage behind the corrected weights of those before it."""
        for stage in self.survey.stages:
            if stage[0].calls > 1:
                if self._recomputes:
                    calls = [run.call for run in runs]
                    self._merged.statistics.recompute(calls, [stage[0].module])
                continue
            found = measure(stage, runs, whole=stage is self.survey.stages[-1])
            for layer in stage:
                self._settle(layer, found.moments[layer.place])
                weights.changed(layer)

    def _correct_on_the_fly(self, layers: Sequence[Layer], run: Run) -> None:
        """Measure every layer when it is called, and correct its output for those behind it."""

        def enter(layer: Layer, moments: Moments, batch: Tensor) -> None:
            moments.add(batch)
            if self._recomputes:
                moments.write(layer.module)

        def leave(layer: Layer, moments: Moments, output: Tensor) -> Tensor:
            if not layer.is_norm:
                moments.add(layer.channels(output, run.mask))
            self._settle(layer, moments)
            correction = _of_output(layer, output, self._corrections)
            return output if correction is None else correction(output)

        handles = []
        for layer in layers:
            moments = Moments()
            if layer.is_norm:
                handles.append(before_call(layer.module, partial(enter, layer, moments)))
            handles.append(after_call(layer.module, partial(leave, layer, moments)))
        with removing(handles):
            run.call()

    @property
    def _recomputes(self) -> bool:
        return self._merged.plan.recipe.buffers == "recompute"

    def _settle(self, layer: Layer, moments: Moments) -> None:
        """Find a layer's correction from the moments of its outputs (of a BatchNorm: its inputs,
        which become its statistics first).
        """
        if layer.is_norm and self._recomputes:
            moments.write(layer.module)
        if layer.weight is None or not moments.rows:
            return
        if any(layer.weight not in own for own in self._own.values()):
            why = "no row of the data reaches it in some source"
            self._report["left alone"][layer.weight] = why
            return
        given = _normalised(layer, moments) if layer.is_norm else (moments.mean, moments.deviation)
        targets = self.targets(layer)
        for whose, values in (("merged network", given), ("sources", targets)):
            if not all(value.isfinite().all() for value in values):
                raise ConfigError(
                    f"REPAIR: {layer.weight}: the outputs of the {whose} are not all finite on the "
                    "data, so that they have no mean. Look for NaN or infinite weights and inputs."
                )
        scale, shift, constant = correction_of(*given, *targets)
        self._corrections[layer.weight] = Correction(scale, None, layer.axis, layer.groups)
        if layer.bias is not None:
            self._corrections[layer.bias] = Correction(scale, shift)
        self._report["scale alone" if layer.bias is None else "corrected"].append(layer.weight)
        if constant:
            self._report["constant channels"][layer.weight] = constant


class _Weights:
    """The merged network's tensors behind the finalisers before REPAIR, corrected so far.

    In resident memory all tensors are kept, in streamed memory each is built when its layer asks.
    """

    def __init__(self, merged: MergedModel, corrections: Mapping[str, Correction]) -> None:
        self._merged, self._corrections = merged, corrections
        self._kept: dict[str, Tensor] = {}

    def read(self, name: str) -> Tensor | None:
        """Return a tensor in the dtype of the computation; None for a private one."""
        state = self._merged.state
        if name not in state.plan.tensors:
            return None
        if name in self._kept:
            return self._kept[name]
        dtype = torch.promote_types(self._merged.dtype, torch.float32)
        theta = self._merged.build(name, state.own(name), dtype)
        if name not in state.fixed:
            theta = state.plan.finalisation.before_repair(name, theta)
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


def _of_output(
    layer: Layer, output: Tensor, corrections: Mapping[str, Correction]
) -> Correction | None:
    """Return what a layer's output is corrected by once its tensors are."""
    found = corrections.get(str(layer.weight))
    if found is None:
        return None
    shift = None
    stored: Tensor | None = getattr(layer.module, "bias", None)
    if layer.bias is not None:
        shift = corrections[layer.bias].shift
    elif stored is not None:  # frozen: it is not scaled with the weight
        shift = (1 - found.scale) * stored.detach().cpu().double()
    return Correction(found.scale, shift, layer.channel_axis(output))


def _normalised(layer: Layer, moments: Moments) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of a BatchNorm's outputs, from the moments of its inputs."""
    module: Any = layer.module
    gain, bias = (value.detach().cpu().double() for value in (module.weight, module.bias))
    mean, variance = (b.cpu().double() for b in (module.running_mean, module.running_var))
    slope = gain / (variance + module.eps).sqrt()
    return bias + slope * (moments.mean - mean), slope.abs() * moments.deviation
