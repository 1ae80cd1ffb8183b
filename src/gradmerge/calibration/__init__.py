"""Statistics of activations and gradients on data."""
