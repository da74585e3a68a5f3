"""Benchmarks of Manta and of other engines, each through its public interface: `make bench`, `make bench-peers`."""
