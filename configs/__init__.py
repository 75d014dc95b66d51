"""Configurations: `schema.py` holds every key with its default, the YAML files only what differs from it."""
