"""One-line errors, atomic writes, random numbers by position, memory and thread settings."""
