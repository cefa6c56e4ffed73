"""What the benchmarks share: processes that leave nothing behind, reports, summaries, provenance."""
