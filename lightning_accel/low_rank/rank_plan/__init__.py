"""Rank plans: which ranks are worth trying, what they cost here, and which are chosen."""
