"""WHERE the shared weights live: the center, its fragments and its statistics.

:class:`~lightning_easgd.center.center.Center` is the copy that all workers share. It lies in flat
vectors (``flat``), cut into the fragments that one exchange moves (``fragments``). Buffers that the
center has too are its ``statistics``. ``swap`` puts it into the module for a while.
"""
