"""From one traced step of a cell to straight-line code for a whole sequence: trace, stage, rewrite, emit, run."""
