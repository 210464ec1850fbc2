"""What scripts/advise.py measures, what it concludes from that, and how it says it."""
