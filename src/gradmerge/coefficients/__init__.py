"""Coefficients: granularity x link x init."""

from gradmerge.coefficients.base import AbstractCoefficients, Layout, MergeTensor, Slot
from gradmerge.coefficients.from_mergekit import FromMergekit
from gradmerge.coefficients.granularity import (
    Column,
    Component,
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
    LeadingComponents,
    MetaGPT,
    Mixup,
    Scaled,
    Uniform,
    initial_raw,
)
from gradmerge.coefficients.link import Clamp, Complement, HardMask, Sigmoid, Softmax, Tanh
from gradmerge.coefficients.scale import WithScale

__all__ = [
    "AbstractCoefficients",
    "AbstractInit",
    "Clamp",
    "Column",
    "Complement",
    "Component",
    "Constant",
    "DepthRamp",
    "Element",
    "FromFile",
    "FromMergekit",
    "Group",
    "HardMask",
    "InitContext",
    "Layout",
    "LeadingComponents",
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
    "WithScale",
    "initial_raw",
]
