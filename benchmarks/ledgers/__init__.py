"""What the ledger's benchmark starts: agents without workers, and a peer's program."""
