"""Models and tokenizers in and out of memory."""
