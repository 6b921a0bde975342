"""The bookkeeping of a training run, so that its loop can stay visible."""
