"""Kinds of component, the hooks that offer them, and the registry of what is installed. No torch at import."""
