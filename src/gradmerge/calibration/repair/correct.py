"""REPAIR's corrections, found layer by layer from channels of the sources and of the merge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradmerge.alignment.views import original_of
from gradmerge.calibration.repair.layers import Layer
from gradmerge.calibration.repair.measure import Channels, Run
from gradmerge.calibration.repair.survey import survey_of
from gradmerge.common.errors import ConfigError
from gradmerge.engine.autograd import checksums
from gradmerge.engine.buffers import ChannelMoments
from gradmerge.engine.merged import MergedModel
from gradmerge.finalisers import REPAIR, Correction, Corrections
from gradmerge.finalisers.repair import correction_of


class Renormalisation:
    """REPAIR of one merged model on given passes, whose rows all count alike.

    Layers and targets do not depend on the coefficients, so they are found once.
    """

    def __init__(self, merged: MergedModel, repair: REPAIR, runs: Sequence[Run]) -> None:
        if not runs:
            raise ConfigError("REPAIR: expected passes over adaptation data, got none.")
        self._merged, self._repair = merged, repair
        # A view that mixes units is another function than its source, whose channels vary less from
        # layer to layer. Targets are those of the others; the reference is always one of them.
        opened = merged.plan.sources
        unmixed = [name for name in opened if original_of(opened[name]) is opened[name]]
        self.survey = survey_of(merged, repair, runs, unmixed)
        if not self.survey.layers:
            reasons = "; ".join(f"{name}: {why}" for name, why in self.survey.left.items())
            raise ConfigError(
                "REPAIR: found no layer to correct: it takes linear layers, convolutions and "
                f"BatchNorm before the network's outputs ({reasons or 'there are none'}). Leave "
                "it out of `finalisers`."
            )

    def targets(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Return the mean and deviation that a layer's channels get, `[channels]`, float64."""
        name, own = layer.weight, self.survey.own
        means, deviations = zip(*(channels[name] for channels in own.values()), strict=True)
        weights = torch.full((len(means), 1), 1 / len(means), dtype=torch.float64)
        if self._repair.interpolate == "coefficients":
            plan = self._merged.plan
            found = self._merged.state.coefficient(name).detach().double().cpu()
            found = found.reshape(len(found), -1).mean(dim=1, keepdim=True)
            found = found[[list(plan.sources).index(source) for source in own]]
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
        """Compute the corrections for the current coefficients, on the same passes again.

        BatchNorm statistics are recomputed on the way if the recipe says so. A single run takes a
        single pass, whose outputs are corrected on the fly.
        """
        merged = self._merged
        self._corrections: dict[str, Correction] = {}
        self._kept: dict[str, Tensor] = {}
        self._report: dict[str, Any] = {
            "corrected": [],
            "scale alone": [],
            "left alone": dict(self.survey.left),
            "constant channels": {},
        }
        try:
            with merged.network_buffers.evaluating(), merged.as_weights(self._read):
                self._correct_stages(runs)
        finally:
            self._kept.clear()
        for layer in self.survey.layers:
            if layer.weight not in self._corrections:
                why = "no row of the data reaches it in the merged network"
                self._report["left alone"].setdefault(layer.weight, why)
        report = {key: value for key, value in self._report.items() if value}
        if len(self.survey.own) < len(merged.plan.sources):
            report["targets of"] = list(self.survey.own)
        report = {"batches": len(runs), **report}
        own = checksums(merged.parameters())
        merged.state.corrections = Corrections(self._corrections, report, own)

    def _correct_stages(self, runs: Sequence[Run]) -> None:
        """Measure each stage behind the corrected weights of those before it."""
        stages = self.survey.stages
        layers = [layer for stage in stages for layer in stage if layer.calls == 1]
        at_once = len(runs) == 1 and len(layers) == sum(map(len, stages))
        settle = self._settle if at_once else None
        for stage in [layers] if at_once else stages:
            if stage[0].calls > 1:
                calls = [run.call for run in runs]
                self._merged.network_buffers.recompute(calls, [stage[0].module])
                continue
            last = layers[-1] in stage
            found = Channels(layers if last else stage, last, settle=settle).measure(runs)
            if last:
                _require_single_calls(layers, found)
            for layer in () if at_once else stage:
                self._settle(layer, found.moments[layer.place])

    def _read(self, name: str) -> Tensor | None:
        """Return a tensor behind the finalisers before REPAIR, corrected so far."""
        merged, state = self._merged, self._merged.state
        if name not in state.plan.tensors or name in self._kept:
            return self._kept.get(name)
        dtype = torch.promote_types(merged.dtype, torch.float32)
        theta = merged.build(name, state.own(name), dtype)
        if name not in state.fixed:
            theta = state.plan.finalisation.before_repair(name, theta)
        if name in self._corrections:
            theta = self._corrections[name](theta)
        theta = theta.to(merged.dtype)
        if merged.memory == "resident":
            self._kept[name] = theta
        return theta

    def _settle(
        self, layer: Layer, moments: ChannelMoments, output: Tensor | None = None
    ) -> Tensor | None:
        """Correct a layer by the moments of its outputs (of a BatchNorm: its inputs, which become
        its statistics first), and return a given output corrected.
        """
        if layer.is_norm and self._merged.plan.recipe.buffers == "recompute":
            self._merged.network_buffers.write(layer.module, moments)
        if not layer.weight or not moments.rows:
            return None
        if any(layer.weight not in own for own in self.survey.own.values()):
            why = "no row of the data reaches it in some source"
            self._report["left alone"][layer.weight] = why
            return None
        scale, shift = self._scale_and_shift(layer, moments)
        self._corrections[layer.weight] = Correction(scale, None, layer.axis, layer.groups)
        if layer.bias:
            self._corrections[layer.bias] = Correction(scale, shift)
        self._report["corrected" if layer.bias else "scale alone"].append(layer.weight)
        self._kept.pop(layer.weight, None)
        self._kept.pop(layer.bias, None)
        if output is None or layer.is_norm:  # it runs with the correction
            return None
        if not layer.bias:  # a frozen one is not scaled with the weight
            bias: Tensor | None = getattr(layer.module, "bias", None)
            shift = None if bias is None else (1 - scale) * bias.cpu().double()
        return Correction(scale, shift, layer.channel_axis(output))(output)

    def _scale_and_shift(
        self, layer: Layer, moments: ChannelMoments
    ) -> tuple[Tensor, Tensor | None]:
        own = _normalised(layer, moments) if layer.is_norm else (moments.mean, moments.deviation)
        targets = self.targets(layer)
        for whose, values in (("merged network", own), ("sources", targets)):
            if not all(value.isfinite().all() for value in values):
                raise ConfigError(
                    f"REPAIR: {layer.weight}: the outputs of the {whose} are not all finite on the "
                    "data, so that they have no mean. Look for NaN or infinite weights and inputs."
                )
        scale, shift, constant = correction_of(*own, *targets)
        if constant:
            self._report["constant channels"][layer.weight] = constant
        return scale, shift


def _require_single_calls(layers: Sequence[Layer], found: Channels) -> None:
    for layer in layers:
        if found.calls[layer.place] > 1:
            raise ConfigError(
                f"REPAIR: the merged network calls {layer.place} more than once in a pass, though "
                "the sources call it once on the same data. No correction holds for all calls at "
                f"once. Name {layer.weight or layer.place} in `skip` of REPAIR, or leave it out of "
                "`finalisers`."
            )


def _normalised(layer: Layer, moments: ChannelMoments) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of a BatchNorm's outputs, from the moments of its inputs."""
    module: Any = layer.module
    gain, bias = (value.detach().cpu().double() for value in (module.weight, module.bias))
    mean, variance = (b.cpu().double() for b in (module.running_mean, module.running_var))
    slope = gain / (variance + module.eps).sqrt()
    return bias + slope * (moments.mean - mean), slope.abs() * moments.deviation
