"""The configuration: its schema, the rules between keys, presets, and how it is loaded."""
