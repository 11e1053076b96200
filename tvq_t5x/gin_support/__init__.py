"""Gin files: read, checked, and explained where they are wrong."""
