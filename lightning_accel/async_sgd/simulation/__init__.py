"""Asynchronous training on a virtual clock: real rules, leases and gradients, any number of workers."""
