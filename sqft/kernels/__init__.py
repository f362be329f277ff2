"""Pure tensor functions: tensors in, tensors out, nothing edited in place."""
