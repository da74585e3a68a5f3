"""One rank's side of a step: a plan becomes tensors, and tensors become tokens. The only part of ``engine`` that uses torch."""
