"""Triton text of a loop: one persistent kernel for all time steps, and what compiles and launches it."""
