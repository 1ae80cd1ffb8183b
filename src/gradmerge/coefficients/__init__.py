"""Coefficients: granularity x link x init."""

from gradmerge.coefficients.base import AbstractCoefficients, Layout, MergeTensor, Slot
from gradmerge.coefficients.from_mergekit import FromMergekit
from gradmerge.coefficients.granularity import (
    Column,
    Element,
    Group,
    Model,
    Partition,
    Row,
    Tensor,
)
from gradmerge.coefficients.init import (
    AbstractInit,
    Constant,
    DepthRamp,
    FromFile,
    InitContext,
    MetaGPT,
    Mixup,
    Scaled,
    Uniform,
    initial_raw,
)
from gradmerge.coefficients.link import Clamp, Complement, Sigmoid, Softmax, Tanh

__all__ = [
    "AbstractCoefficients",
    "AbstractInit",
    "Clamp",
    "Column",
    "Complement",
    "Constant",
    "DepthRamp",
    "Element",
    "FromFile",
    "FromMergekit",
    "Group",
    "InitContext",
    "Layout",
    "MergeTensor",
    "MetaGPT",
    "Mixup",
    "Model",
    "Partition",
    "Row",
    "Scaled",
    "Sigmoid",
    "Slot",
    "Softmax",
    "Tanh",
    "Tensor",
    "Uniform",
    "initial_raw",
]
