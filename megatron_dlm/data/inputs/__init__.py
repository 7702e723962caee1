"""Files of text to documents: formats, byte streams, readers, the order of a command's inputs."""
