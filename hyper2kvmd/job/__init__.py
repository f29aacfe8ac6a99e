"""One migration, from claim to report."""
