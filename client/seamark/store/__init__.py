"""The job's state in the TCPStore: its counters and its key space."""
