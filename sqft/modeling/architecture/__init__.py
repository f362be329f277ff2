"""A model's decoder blocks and linear layers."""
