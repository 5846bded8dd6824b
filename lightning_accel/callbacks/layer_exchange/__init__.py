"""Exchanging layers while a Trainer runs: checkpoints, optimizers, DDP and averages follow; trials leave no trace."""
