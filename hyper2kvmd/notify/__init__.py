"""Telling others of jobs that are over, and the hooks that have a say before one is."""
