"""Talking to libvirt: looking before the copy, defining the domain, booting it for a test."""
