"""Run calibration text through a model block by block, and collect statistics."""
