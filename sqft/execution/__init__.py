"""Run a plan: reuse what the store has, make the rest, write the report."""
