"""What ``lightning-accel bench`` measures; nothing but that command imports it."""
