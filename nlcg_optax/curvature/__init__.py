"""The step that curvature chooses: products, a subspace, and how far to trust them."""
