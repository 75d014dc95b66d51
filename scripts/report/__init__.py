"""The report of runs as one HTML page: `python -m scripts.report`."""
