"""Speed, memory and start of this package and of its peers: `scripts/benchmark`."""
