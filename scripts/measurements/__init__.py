"""What scripts/measure.py measures, one module each."""
