"""Throughput, bytes, waits and memory of ways to train together, on one network after another.

What is asked for is a plan of jobs (``plan``). A cluster runs one job at a time and returns what
each worker measured (``clusters``): emulated hosts, with an agent process each (``agent``), or the
processes that torchrun started. Every job is a process of its own, forked from one that has all
imports and the data (``job``), so that no contender inherits memory, threads or process groups of
another. What jobs found goes to JSON lines (``results``), medians (``summary``), a table and a
picture (``report``).
"""
