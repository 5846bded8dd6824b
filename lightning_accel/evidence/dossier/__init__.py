"""Any number of results gathered into one page that a decision can rest on."""
