"""Python text of a staged step: calls over whole blocks, loops, buffers, and sums over time."""
