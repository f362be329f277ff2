"""The store: finished artifacts, runs, and locks. No torch."""

from sqft.store.artifacts import Artifact, Store

__all__ = ["Artifact", "Store"]
