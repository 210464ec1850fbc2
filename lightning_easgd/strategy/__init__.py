"""All that imports Lightning: the strategy, and what stands between it and the exchange."""
