"""The disk format of a run's state: written whole or not at all, loadable on any layout."""
