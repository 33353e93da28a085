"""Speed and memory on CPUs."""
