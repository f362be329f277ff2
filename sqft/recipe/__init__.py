"""The recipe: what the user wants, in the user's words. No torch, no components."""

from sqft.recipe.recipe import Recipe

__all__ = ["Recipe"]
