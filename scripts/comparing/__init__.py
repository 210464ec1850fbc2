"""Accuracy of update rules at equal samples, over the communication period τ.

What is asked for is a list of jobs: a contender, a period and a seed each (``comparison``). A job
is a training run in workers forked from one process that has all imports and data (``job``). What
jobs found goes to JSON lines, which a later run goes on with, a table and a picture (``report``).
"""
