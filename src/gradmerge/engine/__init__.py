"""The merged network of a recipe, and the gradient of its coefficients."""
