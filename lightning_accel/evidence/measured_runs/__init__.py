"""Paired runs of fits: the clock, the processes of the arms, and the rows they leave."""
