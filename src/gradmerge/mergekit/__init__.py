"""mergekit's configuration files as data; nothing of mergekit is imported."""

from gradmerge.mergekit.content import Document, ModelReference, Problems, Slice
from gradmerge.mergekit.document import is_mergekit, read_document
from gradmerge.mergekit.init import FromMergekit
from gradmerge.mergekit.table import Table, evaluate, tabulate

__all__ = [
    "Document",
    "FromMergekit",
    "ModelReference",
    "Problems",
    "Slice",
    "Table",
    "evaluate",
    "is_mergekit",
    "read_document",
    "tabulate",
]
