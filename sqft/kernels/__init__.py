"""Pure tensor functions: tensors in, tensors out, no argument edited in place. They raise ValueError only."""
