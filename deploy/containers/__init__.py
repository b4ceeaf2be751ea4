"""The image and the compose files run for real: engines, images, stacks."""
