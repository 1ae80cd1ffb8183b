"""Merge block by block, without labels, in the memory of one block."""
