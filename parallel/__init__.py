"""How the work of one model is split over ranks: topology, process groups, collectives, sharded layers."""
