"""Group sizes of quantised weights. Imports no torch, as the memory planner uses it as well."""

GROUP_SIZE = {"int8": 128, "int4": 32, "int4_zeros": 128}
"""Input features that share a scale, and a zero point if there is one (`parallel.zero_points`)."""
PADDED_TO = {"int8": GROUP_SIZE["int8"], "int4": 2 * GROUP_SIZE["int4"], "int4_zeros": GROUP_SIZE["int4_zeros"], "fp8": 1}
"""Input features are zero-padded to a multiple of this; see `parallel.quantised_format`."""
ACTIVATION_GROUP_SIZE = 128
"""Input features that share a scale in activations quantised to 8 bits, whatever the group size of the weights."""
