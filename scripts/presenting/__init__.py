"""The page of scripts/compare.py, from stored results alone.

What runs have in common is an ``entry``; what two entries differ by is a ``difference``. From these
come the first sentence (``sentence``), the bandwidth from which on the baseline wins
(``break_even``), the tables (``tables``) and the figures (``style``, ``figures``). ``page`` puts
them together.
"""
