"""Real servers, real processes, real faults: what clients saw, against an undisturbed run."""
