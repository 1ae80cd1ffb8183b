"""REPAIR: restore the scale of activations that averaging loses."""
