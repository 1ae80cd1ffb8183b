"""Tokenizers that differ, and the rows of embeddings that follow them."""
