"""The engine for more than one machine: workers and parameter shards are actors of Ray, imported only when asked."""
