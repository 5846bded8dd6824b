"""Tables, plots and report pages: how a measured saving is shown."""
