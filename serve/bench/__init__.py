"""`manta bench`: benchmark the engine alone, in this process, and compare it with this machine's limits."""
