"""From a recipe to a merged network and the gradient of its coefficients."""
