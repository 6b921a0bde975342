"""One-line errors for people, crash-safe writes, random numbers by position, dtypes by precision."""
