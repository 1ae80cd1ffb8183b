"""The units of a network that may be permuted without changing its output."""
