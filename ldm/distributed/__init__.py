"""How many processes there are, and who does what."""
