"""Which units of a network may be permuted without changing its output."""
