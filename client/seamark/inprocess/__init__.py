"""Restart in process: the wrapper around a training function, and its parts."""
