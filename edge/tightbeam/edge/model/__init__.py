"""The split model: a transformers model whose trunk is elsewhere."""
