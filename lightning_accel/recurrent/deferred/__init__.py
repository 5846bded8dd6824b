"""Python loops over cells that nobody changed: calls are deferred and run as one chain."""
