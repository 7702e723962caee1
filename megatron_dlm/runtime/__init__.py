"""Where we run: the only code that touches torch.cuda, device names and Megatron's globals."""
