"""Curves of cost against a size: where they bend, as tables and as pictures."""
