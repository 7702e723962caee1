"""What is learned: pure functions from clean text to model inputs, and from logits to a loss."""
