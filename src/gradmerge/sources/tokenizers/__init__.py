"""Tokenizers that differ, and embeddings with one row per token of the merge."""
