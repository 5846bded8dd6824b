"""Callbacks of recurrent layers: intra-stream scheduling and streams that carry their state."""
