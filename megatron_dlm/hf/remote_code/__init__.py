"""The files that travel beside exported models; they import nothing of this package."""
