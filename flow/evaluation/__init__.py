"""Features, metrics, tables and plots of generated images."""
