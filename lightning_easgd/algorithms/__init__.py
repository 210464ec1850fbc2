"""WHAT happens to the weights: pure update rules on flat tensors, one file per family.

Nothing here knows of processes, of Lightning or of time; a rule is a function of tensors and rates.
"""
