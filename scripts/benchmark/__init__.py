"""Speed on this machine: `python -m scripts.benchmark`."""
