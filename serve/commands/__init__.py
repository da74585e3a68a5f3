"""The commands of `manta`, one file each."""
