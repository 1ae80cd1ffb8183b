"""Sources: lazy checkpoints, their compatibility and fingerprints."""

from gradmerge.sources.base import AbstractSource, Checkpoint, TensorInfo
from gradmerge.sources.dequantised import Dequantised
from gradmerge.sources.distributed import Distributed
from gradmerge.sources.files import HuggingFace, SafetensorsFile, TorchFile
from gradmerge.sources.in_memory import InMemory
from gradmerge.sources.lora import Lora
from gradmerge.sources.resolve import EMR, RunAverage, as_source
from gradmerge.sources.tokenizers.vocabulary import Vocabulary

__all__ = [
    "EMR",
    "AbstractSource",
    "Checkpoint",
    "Dequantised",
    "Distributed",
    "HuggingFace",
    "InMemory",
    "Lora",
    "RunAverage",
    "SafetensorsFile",
    "TensorInfo",
    "TorchFile",
    "Vocabulary",
    "as_source",
]
