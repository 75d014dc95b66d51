"""Routes to few steps, compared: `python -m scripts.rectify`."""
