"""The settings: what can be set, and how that is read."""
