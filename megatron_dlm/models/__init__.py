"""Tokens to hidden states to logits, on Megatron Core's GPTModel; knows nothing of losses."""
