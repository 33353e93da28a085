"""What all benchmarks need: where results go, hardware and commit, turns, tables, networks."""
