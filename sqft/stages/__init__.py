"""One verb a file: do a step to a model, then verify what was promised. Nothing algorithmic lives here."""
