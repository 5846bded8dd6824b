"""Python loops over cells that nobody changed: their first call computes all steps, the others get ordinary tensors."""
