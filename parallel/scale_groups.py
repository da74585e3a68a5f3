"""How many input features of a rounded weight go together. No torch: whoever plans a model's memory asks here as well."""

GROUP_SIZE = {"int8": 128, "int4": 32, "int4_zeros": 128}
"""Input features that share a scale, and a zero if there are zeros (`parallel.zero_points`)."""
PADDED_TO = {"int8": GROUP_SIZE["int8"], "int4": 2 * GROUP_SIZE["int4"], "int4_zeros": GROUP_SIZE["int4_zeros"], "fp8": 1}
"""Where features are stored in pieces, they are filled up with zeros to a multiple of so many; see `parallel.quantised_format`."""
ACTIVATION_GROUP_SIZE = 128
"""Input features that share a scale where rows are rounded to 8 bits as well, whatever the weights beside them have."""
