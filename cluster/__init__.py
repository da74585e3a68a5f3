"""Where the engine runs: worker actors, replicas, the router between fronts and replicas."""
