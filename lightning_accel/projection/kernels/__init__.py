"""What touches every entry of a tensor: passes over memory, layouts, rounding, memory for results."""
