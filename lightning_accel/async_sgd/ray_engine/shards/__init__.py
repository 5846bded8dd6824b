"""Parameters in pieces: what one shard does, how pieces are made and merged, who commands all of them."""
