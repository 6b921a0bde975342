"""What a configuration may ask for, and whether it fits together."""
