"""Finding ranks: which are worth trying, what they cost here, and whether the whole pays."""
