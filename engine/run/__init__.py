"""One rank's side of a step: a plan becomes tensors, tensors become tokens. The only torch in ``engine``."""
