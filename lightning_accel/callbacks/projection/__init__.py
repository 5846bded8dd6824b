"""The projection callbacks and what they share."""
