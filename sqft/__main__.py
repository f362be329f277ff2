"""`python -m sqft`."""

from sqft.cli import main

main(prog_name="sqft")
