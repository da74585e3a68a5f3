"""How many input features of a rounded weight go together. No torch: whoever plans a model's memory asks here as well."""

GROUP = {"int8": 128, "int4": 32, "int4_zeros": 128}
"""Input features that share a scale, and a zero if there are zeros (`parallel.zeros`)."""
FILLED_TO = {"int8": GROUP["int8"], "int4": 2 * GROUP["int4"], "int4_zeros": GROUP["int4_zeros"], "fp8": 1}
"""Where features are stored in pieces, they are filled up with zeros to a multiple of so many; see `parallel.scaled_format`."""
ROW_GROUP = 128
"""Input features that share a scale where rows are rounded to 8 bits as well, whatever the weights beside them have."""
