"""Projections on an accelerator, where looking at a number waits for all work before it: nothing here looks."""
