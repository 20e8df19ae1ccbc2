"""What runs a model: the paged cache and the forward pass."""
