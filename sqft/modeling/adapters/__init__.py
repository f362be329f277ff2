"""Frozen weights, adapters on them, and the effective weight."""
