"""`manta bench`: the engine alone, in this process, against the floor of this machine."""
