"""Records become prompts, prompts become tokens."""
