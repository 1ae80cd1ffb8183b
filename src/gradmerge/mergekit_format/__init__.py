"""mergekit's configuration files as data; nothing of mergekit is imported."""

from gradmerge.mergekit_format.content import Document, ModelReference, Problems, Slice
from gradmerge.mergekit_format.document import is_mergekit, read_document
from gradmerge.mergekit_format.table import Table, evaluate, tabulate

__all__ = [
    "Document",
    "ModelReference",
    "Problems",
    "Slice",
    "Table",
    "evaluate",
    "is_mergekit",
    "read_document",
    "tabulate",
]
