"""What is saved of the center and of each worker, and how training goes on from it."""
