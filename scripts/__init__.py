"""Tools: `python -m scripts.<name> --help`."""
