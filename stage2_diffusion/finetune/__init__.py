"""Fine-tuning of a part of a model: what is frozen, what is trained, and what a run hands over."""
