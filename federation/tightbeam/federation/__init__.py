"""Many edges, one adapter: rounds of training on Flower."""
