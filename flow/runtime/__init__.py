"""Processes, files and the command line."""
