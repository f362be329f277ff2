"""transformers' Trainer for deltas."""
