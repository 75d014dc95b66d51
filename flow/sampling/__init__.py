"""From weights to images."""
