"""Tests every model that a checkpoint holds."""
