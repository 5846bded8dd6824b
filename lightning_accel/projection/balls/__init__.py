"""Balls and the projections onto them: norms of groups, thresholds, bi-level and exact."""
