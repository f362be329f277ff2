"""Models on disk: find them, read their headers, write their settings. No torch at import."""
