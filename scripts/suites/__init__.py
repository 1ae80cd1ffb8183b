"""Scripts that build the suites of models and data which the examples run on."""
