"""What gradients and values are on the wire: compressed, checked, never pickle."""
