"""The processes of a run: launch, agreement, gradient accumulation, sharding."""
