"""Draws several runs together, from what they have stored alone."""
