"""Ray Train + DeepSpeed + PEFT adapter training with a replayable trace."""
