"""What each interpreter that a test starts does first: it looks less often for garbage.

A sixth of the seconds that imports take went to look for it, and what is imported stays.
"""

import gc

gc.set_threshold(100_000)
