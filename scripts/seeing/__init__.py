"""What a run has written, as curves and on the screen."""
