"""How a sparse checkpoint calls itself. ``kernels/README.md`` specifies the format."""

FORMAT, VERSION = "leap-sparse", 2
#: ``quant_method`` in its config.json: the name of the quantiser that transformers reads it with.
METHOD = "leap"
