"""Accuracy of update rules at equal samples, over the communication period τ.

What is asked for is a list of jobs: a contender, a period, a learning rate and a seed each
(``plan``). A job is a training run in workers forked from one process that has all imports and data
(``job``, ``running``). What jobs found goes to JSON lines, which a later run goes on with
(``comparison``), to a table of differences (``paired``), and to a table and a picture over τ
(``report``).
"""
