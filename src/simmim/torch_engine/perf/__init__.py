"""Speed, memory and cost of a training step."""
