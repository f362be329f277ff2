"""A recipe and a registry become a plan: steps with fingerprints and estimates. No torch."""
