"""Checks of configuration and machine before a training: `python -m scripts.doctor`."""
