"""Whole experiments on one machine: a cloud and its edges as real processes, real texts, a real model."""
