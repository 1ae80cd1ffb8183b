"""mergekit's configuration files, read and written; nothing of mergekit is imported."""

from gradmerge.mergekit.document import is_mergekit
from gradmerge.mergekit.init import FromMergekit
from gradmerge.mergekit.reader import Reading, read_mergekit
from gradmerge.mergekit.writer import write_mergekit

__all__ = ["FromMergekit", "Reading", "is_mergekit", "read_mergekit", "write_mergekit"]
