"""One-line errors, atomic writes, random numbers by position, dtypes by precision, memory and thread settings."""
