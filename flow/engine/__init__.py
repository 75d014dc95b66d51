"""All that touches processes, files and clocks."""
