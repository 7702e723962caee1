"""What the user may say. Nothing in this folder imports torch."""
