"""Text to token ids: tokenizers, how they are trained or adopted, and the fast encoder."""
