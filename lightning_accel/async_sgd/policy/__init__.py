"""What asynchronous workers agree on: leases, staleness rules and the server's arithmetic; no processes here."""
