"""Merges that match the behaviour of the sources on data, as steps on directions.

Given a positive statistic `C_k` of source k on the data of its task, the merged tensor minimises
`sum_k w_k |theta - theta_k|^2` in the norms defined by the `C_k`:

    theta = (sum_j w_j C_j)^-1 sum_k w_k C_k theta_k = A + sum_k B'_k
    B'_k  = (sum_j w_j C_j)^-1 w_k C_k B_k

for any origin A, since `sum_k (sum_j w_j C_j)^-1 w_k C_k = I`. Coefficients of 1 give the published
method; learned ones start there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from gradmerge.common.errors import ConfigError, require
from gradmerge.common.spec import Setting, require_setting, settle
from gradmerge.preprocess.base import AbstractPreprocess, Site
from gradmerge.sources.collected import Needs, Statistic


@dataclass(frozen=True)
class FisherScale(AbstractPreprocess):
    """Weigh each entry by its diagonal Fisher information (Fisher merging, arXiv 2111.09832).

        F_k  = E[(d log p(y | x) / d theta_k)^2]
        B'_k = w_k F_k (.) B_k / sum_j w_j F_j

    The expectation is over the examples x of task k, with y as chosen by `labels`. Tensors without
    gradient are averaged with weights `w`.
    """

    floor: float = 1e-6
    """Lower bound of `F_k`, applied after `normalise`: entries without information in any source
    are averaged."""
    normalise: bool = True
    """Divide `F_k` by its L2 norm over all tensors, so that all sources have the same weight."""
    weights: Setting = 1.0
    """Weight `w_k`: one number, one per source, or by tensor."""
    labels: Literal["model", "data"] = "model"
    """Labels y: drawn from the source's own predictions (Fisher information), or those of the data
    (empirical Fisher)."""
    per: Literal["example", "batch"] = "example"
    """Square the gradient of each example, or of the sum over a batch of `eval_batch_size`. The
    latter needs as many times fewer backward passes, and is unbiased for drawn labels, whose
    gradients are independent with mean zero."""
    seed: int = 0
    """Seed of the drawn labels."""

    def __post_init__(self) -> None:
        """Validate the options."""
        _require_weights("FisherScale", self.weights)
        require(self.floor > 0, "FisherScale.floor", "a number above 0", self.floor)
        if self.per == "batch" and self.labels == "data":
            raise ConfigError(
                "FisherScale: per batch needs labels: model. Gradients for the labels of the data "
                "are not independent with mean zero, so the square of their sum is biased. Use "
                "per: example."
            )

    @property
    @override
    def needs(self) -> Needs:
        return Needs("fisher", labels=self.labels, per=self.per, seed=self.seed)

    @override
    def __call__(self, directions: Tensor, site: Site) -> Tensor:
        found = site.statistics("fisher", directions.shape[1:])
        weights = settle("FisherScale.weights", self.weights, site.name, site.sources)
        if found is None:
            return _averaged(directions, weights)
        total = torch.zeros(directions.shape[1:], dtype=torch.float64)
        scales = []
        for statistic, weight in zip(found, weights, strict=True):
            fisher = statistic.values["fisher"].double()
            if self.normalise and statistic.norm > 0:
                fisher = fisher / statistic.norm
            scales.append(fisher.clamp_(min=self.floor).mul_(weight))
            total += scales[-1]
        for direction, scale in zip(directions, scales, strict=True):
            direction.copy_(direction.double().mul_(scale.div_(total)))
        return directions


@dataclass(frozen=True)
class RegMean(AbstractPreprocess):
    """Match the outputs of every linear layer on the data of the tasks (RegMean, arXiv 2212.09849).

        C_k  = a G_k + (1 - a) diag(G_k) + d I,     G_k = X_k^T X_k / rows
        B'_k = B_k w_k C_k (sum_j w_j C_j)^-1       for a weight [out, in]

    `X_k` are the inputs of the layer when source k runs on the data of task k. The system is solved
    by Cholesky decomposition in float64. Layers are `nn.Linear`, transformers' `Conv1D`, and 1-D
    and 2-D convolutions (with unfolded inputs, one system per group). All other tensors are
    averaged with weights `w`, including weights tied to an embedding and weights that their layer
    transforms before use (weight standardisation), which are detected and reported.

    `activations: merged` is RegMean++ (arXiv 2508.03121): the data of task k run through the blocks
    that are already merged and, within a block, through the weights of source k.
    """

    off_diagonal: float = 0.9
    """Factor `a` on off-diagonal entries, in [0, 1]; values below 1 keep the solution closer to the
    average."""
    activations: Literal["source", "merged"] = "source"
    """Inputs of a layer come from the source itself, or from the merged layers (RegMean++)."""
    normalise: bool = True
    """Divide by the number of rows, so that tasks have the same weight for any amount of data."""
    damping: float = 1e-6
    """Damping `d`, relative to the mean diagonal of the sources' matrices; inputs that no data
    reach are averaged."""
    weights: Setting = 1.0
    """Weight `w_k`: one number, one per source, or by tensor."""

    def __post_init__(self) -> None:
        """Validate the options."""
        _require_weights("RegMean", self.weights)
        require(self.damping >= 0, "RegMean.damping", "at least 0", self.damping)
        share = self.off_diagonal
        require(0 <= share <= 1, "RegMean.off_diagonal", "a number in [0, 1]", share)

    @property
    @override
    def needs(self) -> Needs:
        return Needs("gram", activations=self.activations)

    @override
    def __call__(self, directions: Tensor, site: Site) -> Tensor:
        found = site.statistics("gram", directions.shape[1:])
        weights = settle("RegMean.weights", self.weights, site.name, site.sources)
        if found is None:
            return _averaged(directions, weights)
        grams = [_gram(statistic, "gram", self.normalise) for statistic in found]
        for gram in grams:
            diagonal = gram.diagonal(dim1=-2, dim2=-1).clone()
            gram.mul_(self.off_diagonal).diagonal(dim1=-2, dim2=-1).copy_(diagonal)
        grams = _damped(grams, weights, self.damping)
        factor, failed = torch.linalg.cholesky_ex(_sum(grams))
        if bool(failed.any()):
            raise ConfigError(
                f"RegMean: the Gram matrices of {site.name} are singular. Set a damping above "
                f"{self.damping:g} or a smaller off_diagonal, or provide more data."
            )
        for direction, gram in zip(directions, grams, strict=True):
            wide = _as_rows(direction, found[0].axis, gram)
            solved = torch.cholesky_solve((wide @ gram).mT, factor).mT
            _write_rows(direction, found[0].axis, solved)
        return directions


@dataclass(frozen=True)
class MaTS(AbstractPreprocess):
    """Match the sources in their task parameter subspaces by conjugate gradients (MaTS, arXiv
    2312.04339).

    Solves `sum_k w_k C_k(W) = sum_k w_k C_k(W_k)` for each linear layer's weight `[out, in]`, where

        gram:  C_k(W) = W G_k            G_k = X_k^T X_k / rows
        kfac:  C_k(W) = D_k W G_k        D_k = E[d^T d], d the gradient of log p(y | x) in the
                                         layer's output, y drawn from the source's predictions

    starting from the average, in float64. For `kfac`, the sum of such operators has no closed-form
    inverse. Given the step lengths, every iterate is linear in the directions, so the same steps
    are applied to each `B_k` separately (K times the work), and `A + sum_k B'_k` is the iterate
    itself. Few iterations stay near the average; the paper tunes only their number. Layers are
    those of `RegMean`; `kfac`, which approximates curvature anyway, also includes weights that
    their layer transforms before use.
    """

    iterations: int = 20
    """Maximum number of conjugate gradient iterations; worth tuning, since more may overfit."""
    tolerance: float = 1e-8
    """Norm of the residual, relative to the right-hand side, at which to stop."""
    statistic: Literal["gram", "kfac"] = "gram"
    """Gram matrices of the inputs alone, or also those of the gradients of the outputs."""
    damping: float = 1e-6
    """Multiple of the identity added to each matrix, relative to the sources' mean diagonal."""
    weights: Setting = 1.0
    """Weight `w_k`: one number, one per source, or by tensor."""
    seed: int = 0
    """Seed of the drawn labels y (kfac)."""

    def __post_init__(self) -> None:
        """Validate the options."""
        _require_weights("MaTS", self.weights)
        require(self.damping >= 0, "MaTS.damping", "at least 0", self.damping)
        require(self.iterations >= 0, "MaTS.iterations", "at least 0", self.iterations)
        require(self.tolerance >= 0, "MaTS.tolerance", "at least 0", self.tolerance)

    @property
    @override
    def needs(self) -> Needs:
        return Needs(self.statistic, seed=self.seed if self.statistic == "kfac" else 0)

    @override
    def __call__(self, directions: Tensor, site: Site) -> Tensor:
        found = site.statistics(self.statistic, directions.shape[1:])
        weights = settle("MaTS.weights", self.weights, site.name, site.sources)
        if found is None:
            return _averaged(directions, weights)
        kfac = self.statistic == "kfac"
        inputs = [_gram(statistic, "input" if kfac else "gram", True) for statistic in found]
        inputs = _damped(inputs, weights, self.damping)
        outputs = None
        if kfac:
            outputs = [statistic.values["output"].double() for statistic in found]
            outputs = _damped(outputs, [1.0] * len(outputs), self.damping)
        axis = found[0].axis
        rows = torch.stack([_as_rows(direction, axis, inputs[0]) for direction in directions])
        for direction, solved in zip(
            directions, self._solve(rows, inputs, outputs, weights), strict=True
        ):
            _write_rows(direction, axis, solved)
        return directions

    def _solve(
        self,
        rows: Tensor,
        inputs: list[Tensor],
        outputs: list[Tensor] | None,
        weights: list[float],
    ) -> Tensor:
        """Return the part of each source in the solution, `[sources, groups, out, in]`."""
        single = _sum(inputs)

        def operator(parts: Tensor) -> Tensor:
            if outputs is None:
                return parts @ single
            return _sum([left @ parts @ right for left, right in zip(outputs, inputs, strict=True)])

        target = torch.stack(
            [
                row @ right if outputs is None else outputs[k] @ row @ right
                for k, (row, right) in enumerate(zip(rows, inputs, strict=True))
            ]
        )
        share = torch.tensor(weights, dtype=rows.dtype).view(-1, 1, 1, 1) / sum(weights)
        parts = rows * share
        residual = target - operator(parts)
        step = residual.clone()
        goal = self.tolerance * float(target.sum(dim=0).norm())
        square = float(residual.sum(dim=0).square().sum())
        for _ in range(self.iterations):
            if square**0.5 <= goal or square == 0:
                break
            applied = operator(step)
            length = square / float((step.sum(dim=0) * applied.sum(dim=0)).sum())
            parts += length * step
            residual -= length * applied
            before, square = square, float(residual.sum(dim=0).square().sum())
            step = residual + (square / before) * step
        return parts


def _require_weights(who: str, weights: Setting) -> None:
    require_setting(f"{who}.weights", weights, "a number above 0", lambda x: x > 0)


def _averaged(directions: Tensor, weights: list[float]) -> Tensor:
    for direction, weight in zip(directions, weights, strict=True):
        direction.mul_(weight / sum(weights))
    return directions


def _gram(statistic: Statistic, part: str, normalise: bool) -> Tensor:
    gram = statistic.values[part].double()
    return gram / max(1.0, statistic.rows) if normalise else gram.clone()


def _damped(matrices: list[Tensor], weights: list[float], damping: float) -> list[Tensor]:
    """Return `w_k (C_k + d I)`, with d relative to the mean diagonal entry over all matrices.

    Each matrix gets its own multiple of the identity, so the parts still sum to the whole; if all
    matrices are zero, the result is the average.
    """
    mean = sum(float(m.diagonal(dim1=-2, dim2=-1).mean()) for m in matrices) / len(matrices)
    added = damping * mean if mean > 0 else 1.0
    for matrix, weight in zip(matrices, weights, strict=True):
        matrix.diagonal(dim1=-2, dim2=-1).add_(added)
        matrix.mul_(weight)
    return matrices


def _sum(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors).sum(dim=0)


def _as_rows(direction: Tensor, axis: int, gram: Tensor) -> Tensor:
    """Return the weight of a layer as `[groups, out, in]`, float64."""
    wide = direction.double()
    return (wide.mT if axis == 0 else wide).reshape(gram.shape[0], -1, gram.shape[-1])


def _write_rows(direction: Tensor, axis: int, rows: Tensor) -> None:
    if axis == 0:
        direction.copy_(rows.reshape(direction.shape[1], direction.shape[0]).mT)
    else:
        direction.copy_(rows.reshape(direction.shape))
