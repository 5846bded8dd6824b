"""Exact or plain: what a schedule assumes, where it may not run at all, and how it is compared with the plain loop."""
