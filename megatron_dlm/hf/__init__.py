"""In and out of Hugging Face's format, tensor by tensor; no ranks."""
