"""The one place that touches private attributes of Lightning, each with its reason."""
