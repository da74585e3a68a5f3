"""What `manta` can do, one file per command."""
